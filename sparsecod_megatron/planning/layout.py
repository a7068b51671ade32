"""What one rank of a layout holds and handles: its layers, its tokens, its share of every parallel dimension."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsecod_megatron.config import ModelConfig, ParallelConfig, RunConfig, data_parallel_size
from sparsecod_megatron.config.flops import is_windowed
from sparsecod_megatron.config.megatron_fields import STAGE_FIELDS
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.seams.mechanism import RankShape, configured, residual_state


@dataclass(frozen=True)
class Layout:
    """A checked run on a number of processes; make it with `layout_of`.

    Attributes:
        config: the run; its vocabulary is known.
        gpus: number of processes.
        data_parallel: replicas, not counting context parallelism.
        transformer_engine: whether the modules are Transformer Engine's (CUDA) or the reference ones (CPU).
    """

    config: RunConfig
    gpus: int
    data_parallel: int
    transformer_engine: bool = True

    @property
    def model(self) -> ModelConfig:
        """The model's section."""
        return self.config.model

    @property
    def parallel(self) -> ParallelConfig:
        """The layout's section."""
        return self.config.parallel

    @property
    def tensor(self) -> int:
        """Tensor parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def context(self) -> int:
        """Context parallel size."""
        return self.parallel.context_parallel_size

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """Model chunks of a stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def expert_data_parallel(self) -> int:
        """Replicas of an expert."""
        parallel = self.parallel
        return self.gpus // (parallel.expert_tensor_size * parallel.expert_model_parallel_size * self.stages)

    @property
    def gradient_parallel(self) -> int:
        """Ranks that sum the gradient of what is not an expert: data × context parallel."""
        return self.data_parallel * self.context

    @property
    def num_microbatches(self) -> int:
        """Forward passes of one rank in one step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.data_parallel)

    @property
    def bytes_per_value(self) -> int:
        """Bytes per value of weights and activations."""
        return 2 if self.config.precision.dtype == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that this rank's matrix products see."""
        return self.config.train.micro_batch_size * self.config.data.seq_length // self.context

    @property
    def norm_tokens(self) -> int:
        """Those that its norms and residual stream see: fewer with sequence parallelism."""
        return self.tokens // self.tensor if self.parallel.sequence_parallel else self.tokens

    def expert_rows(self, layer: int) -> int:
        """Rows that this rank's experts of a layer get from one micro-batch, if the load is even."""
        factor = self.model.moe_expert_capacity_factor
        kept = 1.0 if factor is None else min(1.0, factor)
        return math.ceil(self.norm_tokens * self.model.topk(layer) * self.parallel.expert_tensor_size * kept)

    def layers(self, stage: int, chunk: int) -> range:
        """Layers (from 0) of a chunk of a stage."""
        size = self.model.num_layers // (self.stages * self.chunks)
        first = (chunk * self.stages + stage) * size
        return range(first, first + size)

    @cached_property
    def representatives(self) -> list[int]:
        """For each layer the first one that holds and costs the same."""
        first: dict[tuple[object, ...], int] = {}
        traits = [self._traits(layer) for layer in range(self.model.num_layers)]
        return [first.setdefault(trait, layer) for layer, trait in enumerate(traits)]

    def _traits(self, layer: int) -> tuple[object, ...]:
        model = self.model
        moe = model.is_moe_layer(layer)
        plain = moe, moe and model.topk(layer), model.is_post_norm(layer), is_windowed(model, layer), self.in_fp8(layer)
        own = [tuple(mechanism.parameters(model, layer)) for mechanism in configured(self.config)]
        return *plain, *own, *self.mechanism_bytes(layer).items()

    @cached_property
    def table(self) -> ParameterTable:
        """The table of the model's parameters."""
        return ParameterTable.of(self.config)

    def mechanism_bytes(self, layer: int) -> dict[str, int]:
        """What mechanisms keep of a layer's forward pass, by module."""
        rank = RankShape(
            tokens=self.tokens,
            stream_tokens=self.norm_tokens,
            expert_rows=self.expert_rows(layer) if self.model.is_moe_layer(layer) else 0,
            tensor=self.tensor,
            expert_tensor=self.parallel.expert_tensor_size,
            context=self.context,
            seq_length=self.config.data.seq_length,
            value_bytes=self.bytes_per_value,
            norm_bytes=self.stream_norm_bytes(1),
            is_reference=not self.transformer_engine,
        )
        saved: dict[str, int] = {}
        for mechanism in configured(self.config):
            saved |= mechanism.saved_bytes(self.model, layer, rank)
        return saved

    def norm_bytes(self, vectors: int, channels: int) -> int:
        """An RMSNorm's input and its 1 / rms, fp32, for each vector; the reference keeps x and x / rms, both fp32."""
        value = self.bytes_per_value if self.transformer_engine else 2 * 4
        return vectors * (channels * value + 4)

    def stream_norm_bytes(self, vectors: int) -> int:
        """The same of a norm of the residual stream; a LayerNorm's input, mean and 1 / deviation, the latter fp32."""
        if self.model.normalization == "RMSNorm":
            return self.norm_bytes(vectors, self.model.hidden_size)
        return vectors * (self.model.hidden_size * self.bytes_per_value + 2 * 4)

    @property
    def state_bytes(self) -> int:
        """Bytes of a micro-batch's residual state on this rank, as stages send it and recompute keeps it."""
        state = residual_state(self.config)
        value = 4 if state.in_fp32 else self.bytes_per_value
        return self.norm_tokens * state.columns * self.model.hidden_size * value

    def in_fp8(self, layer: int) -> bool:
        """Whether the layer's projections multiply in FP8, and keep their inputs in it."""
        precision, last = self.config.precision, self.model.num_layers - 1
        if not precision.fp8 or not self.transformer_engine:
            return False
        return layer >= precision.num_layers_at_start_in_bf16 and last - layer >= precision.num_layers_at_end_in_bf16

    def stage_layers(self, stage: int) -> Counter[int]:
        """How many of a stage's layers each representative stands for."""
        return Counter(self.representatives[layer] for layer in self._layers_of(stage))

    def stage_owners(self, stage: int) -> Counter[int]:
        """The same of the layers that hold parameters, and do not compute with another's."""
        own = (layer for layer in self._layers_of(stage) if self.table.owner(layer) == layer)
        return Counter(self.representatives[layer] for layer in own)

    def _layers_of(self, stage: int) -> Iterator[int]:
        return (layer for chunk in range(self.chunks) for layer in self.layers(stage, chunk))

    def stage_parameters(self, stage: int) -> Iterator[tuple[ParameterKind, int]]:
        """Every parameter of a stage's ranks, before splitting, and how many of it there are."""
        ends: list[ParameterKind] = []
        if stage == 0:
            ends.extend(self.table.first())
        if stage == self.stages - 1:
            ends.extend(self.table.last(shares_embedding=self.stages == 1))
        yield from ((kind, 1) for kind in ends)
        for layer, count in self.stage_owners(stage).items():
            yield from ((kind, count) for kind in self.table.layer(layer))

    @cached_property
    def distinct_stages(self) -> list[int]:
        """The first of each sort of stage; of equals it holds the most activations."""
        seen: dict[tuple[object, ...], int] = {}
        for stage in range(self.stages):
            counts = (self.stage_layers(stage), self.stage_owners(stage))
            sort = (stage == 0, stage == self.stages - 1, *(tuple(sorted(count.items())) for count in counts))
            seen.setdefault(sort, stage)
        return list(seen.values())

    def on_rank(self, kind: ParameterKind) -> int:
        """Number of parameters of a kind that one rank holds."""
        parallel = self.parallel
        experts = {"expert": parallel.expert_model_parallel_size, "expert_tensor": parallel.expert_tensor_size}
        return kind.on_rank(tensor=self.tensor, **experts)

    def replicas(self, kind: ParameterKind) -> int:
        """Ranks over which the optimizer's state of a kind is sharded."""
        return self.expert_data_parallel if kind.split == "expert" else self.gradient_parallel

    @cached_property
    def recompute(self) -> Recompute:
        """What is computed a second time instead of kept."""
        return Recompute.read(self.config.megatron)


@dataclass(frozen=True)
class Recompute:
    """Megatron's `recompute_*` fields.

    Attributes:
        granularity: `none`, `selective` or `full`.
        modules: modules of `selective`.
        method: method of `full`: `uniform` keeps the input of every `num_layers` layers, `block` recomputes the first
            `num_layers` of each chunk one by one.
        num_layers: layers of `full`.
    """

    granularity: str = "none"
    modules: tuple[str, ...] = ()
    method: str = "uniform"
    num_layers: int = 1

    @classmethod
    def read(cls, megatron: dict[str, Any]) -> Recompute:
        """From the `megatron:` section of a checked run."""
        granularity = megatron.get("recompute_granularity") or "none"
        if granularity == "none":
            return cls()
        if granularity == "selective":
            return cls("selective", tuple(megatron.get("recompute_modules") or ("core_attn",)))
        return cls("full", (), megatron["recompute_method"], megatron["recompute_num_layers"])

    def units(self, layers: range) -> tuple[list[range], range]:
        """(runs of layers recomputed together, layers kept whole) of one chunk."""
        if self.granularity != "full":
            return [], layers
        if self.method == "uniform":
            return [layers[i : i + self.num_layers] for i in range(0, len(layers), self.num_layers)], layers[:0]
        return [layers[i : i + 1] for i in range(min(self.num_layers, len(layers)))], layers[self.num_layers :]


def layout_of(config: RunConfig, gpus: int, *, transformer_engine: bool = True) -> Layout:
    """The layout of a checked run whose vocabulary is known.

    Raises:
        ConfigError: it does not fit that number of processes, or divides its layers in a way not planned for.
    """
    for key in STAGE_FIELDS:
        if config.megatron.get(key):
            raise ConfigError(f"megatron.{key}: {config.megatron[key]!r}, but plan divides layers evenly; remove it")
    return Layout(config, gpus, data_parallel_size(config, gpus), transformer_engine)
