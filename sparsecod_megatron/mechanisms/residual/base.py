"""What all remedies of the residual path share: rows of the table, export, refusals. A kind adds its formulas alone.

A kind is a dataclass of settings that says the shapes of its parameters, and a file `<kind>_sparsecod.py` with the
class `Path` (`seams/residual.py`), by which it is trained and exported.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS, ParameterKind
from sparsecod_megatron.seams.mechanism import ExportedTensor, Folds, Mechanism, Module, RankShape
from sparsecod_megatron.seams.residual import ResidualPath

MAX_PACKED_SLOTS = 16
"""Vectors of a token beyond which pipeline messages and kept inputs of recomputed layers are mostly copies."""
_PLACES = (("input_layernorm.read", "self_attn_bda.write"), ("pre_mlp_layernorm.read", "mlp_bda.write"))
"""Where attention and MLP read and write, in a layer of a GPTModel."""
_EXPORTED = (
    ("attention_residual.read", "attention_residual.write"),
    ("mlp_residual.read", "mlp_residual.write"),
)
"""The same in a layer of the `sparsecod` architecture."""


@dataclass(frozen=True)
class StreamParameter:
    """A parameter of a read, a join or the expansion, the same on every rank.

    Attributes:
        name: in its module.
        shape: whole.
        is_norm: whether it decays and learns as the weights of norms do.
        products: numbers that a token's vectors are multiplied by, where they are not those of a matrix.
        rate: factor on the learning rate.
    """

    name: str
    shape: tuple[int, ...]
    is_norm: bool = False
    products: int | None = None
    rate: float = 1.0


@dataclass
class ResidualMechanism(Mechanism):
    """A residual path; a run has one at most."""

    shapes_weights: ClassVar[bool] = True
    shares_layers: ClassVar[bool] = True
    has_own_norms: ClassVar[bool] = False
    """Whether LayerNorm scaling would scale what it normalises again."""
    placements: ClassVar[tuple[str, ...]] = ("pre",)
    """`model.norm_placement` that it goes with."""

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Parameters of what a sub-layer (attention 2l, MLP 2l + 1; the end 2L) reads by."""
        return ()

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Parameters of how a sub-layer's branch is joined."""
        return ()

    def expansion(self, model: ModelConfig) -> tuple[StreamParameter, ...]:
        """Parameters of the first state."""
        return ()

    def residual_path(self, model: ModelConfig) -> ResidualPath:
        """`Path` of the file that is exported."""
        code = importlib.import_module(f"{type(self).__module__}_sparsecod")
        sizes = {"hidden_size": model.hidden_size, "num_layers": model.num_layers, "eps": model.layernorm_epsilon}
        path: ResidualPath = code.Path(dataclasses.asdict(self), **sizes)
        return path

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Another path, norms that stand elsewhere, and what Megatron-Core does to the residual stream by itself."""
        others = [other.name for other in config.mechanisms.values() if isinstance(other, ResidualMechanism)]
        if others[0] != self.name:
            yield f"mechanisms.{self.name}: the residual path is mechanisms.{others[0]}'s; keep one of them"
        model = config.model
        if model.norm_placement not in self.placements:
            yield (
                f"model.norm_placement: {model.norm_placement}, but mechanisms.{self.name} takes "
                f"{' or '.join(self.placements)}; set that"
            )
        if model.residual_multiplier != 1:
            yield (
                f"model.residual_multiplier: {model.residual_multiplier:g}, but mechanisms.{self.name} joins branches "
                "its own way; set it to 1"
            )
        if self.has_own_norms and model.normalization != "RMSNorm":
            yield f"model.normalization: {model.normalization}, but mechanisms.{self.name} has RMSNorms; set RMSNorm"
        if self.has_own_norms and model.layernorm_scaling:
            yield f"model.layernorm_scaling: true, but mechanisms.{self.name} has norms of its own; set it to false"
        recompute = config.megatron.get("recompute_granularity") == "full"
        pipeline = config.parallel.pipeline_model_parallel_size > 1
        if (pipeline or recompute) and (columns := self.residual_state(model).columns) > MAX_PACKED_SLOTS:
            yield (
                f"mechanisms.{self.name}: {columns} vectors per token are too many for pipeline messages and full "
                f"recompute, which copy them all (at most {MAX_PACKED_SLOTS}); lower them, or leave both out"
            )
        if config.megatron.get("fine_grained_activation_offloading"):
            yield (
                f"megatron.fine_grained_activation_offloading: true releases the residual stream that mechanisms."
                f"{self.name} reads again; remove one of them"
            )

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Rows of both reads and both joins."""
        for sublayer, (read, write) in enumerate(_PLACES, start=2 * layer):
            yield from self._rows(self.reads(model, sublayer), "read", read)
            yield from self._rows(self.joins(model, sublayer), "join", write)

    def end_parameters(self, model: ModelConfig) -> tuple[list[ParameterKind], list[ParameterKind]]:
        """Rows of the expansion and of the last read."""
        last = self._rows(self.reads(model, 2 * model.num_layers), "read", "decoder.final_layernorm.read")
        return list(self._rows(self.expansion(model), "expansion", "expansion.expand")), list(last)

    def _rows(self, parameters: tuple[StreamParameter, ...], part: str, module: str) -> Iterator[ParameterKind]:
        for own in parameters:
            yield ParameterKind(
                f"{self.name}_{part}_{own.name.replace('.', '_')}",
                own.shape,
                re.escape(f"{module}.{own.name}"),
                "norms" if own.is_norm else NEVER_DECAYS,
                products=own.products,
                rate=own.rate,
            )

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """What reads and joins of a layer keep, with the expansion in the first and the end's read in the last."""
        read, join = partial(self.kept_by_read, model, rank), partial(self.kept_by_join, model, rank)
        kept = sum(read(branch) + join(branch) for branch in (2 * layer, 2 * layer + 1))
        if layer == 0:
            kept += self.kept_by_expansion(rank)
        if layer == model.num_layers - 1:
            kept += read(2 * model.num_layers)
        return {"residual": rank.stream_tokens * kept} if kept else {}

    def kept_by_expansion(self, rank: RankShape) -> int:
        """Bytes per token beyond those of the plain model."""
        return 0

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The same of a read; the vector that it gives is counted by the norm behind it."""
        return 0

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The same of a join."""
        return 0

    def export(self, model: ModelConfig) -> Folds | Module:
        """The same path in a model of our own class."""
        code = Path(importlib.import_module(type(self).__module__).__file__ or "")
        return Module(
            code=code.with_name(f"{code.stem}_sparsecod.py"),
            settings=dataclasses.asdict(self),
            tensors=tuple(self._tensors(model)),
            beside=(Path(__file__).with_name("streams_sparsecod.py"),),
        )

    def _tensors(self, model: ModelConfig) -> Iterator[ExportedTensor]:
        yield from _pairs("expansion.expand", "model.layers.0.expansion", self.expansion(model))
        for layer in range(model.num_layers):
            ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
            for sublayer, here, there in zip((2 * layer, 2 * layer + 1), _PLACES, _EXPORTED, strict=True):
                yield from _pairs(f"{ours}.{here[0]}", f"{theirs}.{there[0]}", self.reads(model, sublayer))
                yield from _pairs(f"{ours}.{here[1]}", f"{theirs}.{there[1]}", self.joins(model, sublayer))
        last = model.num_layers - 1
        reads = self.reads(model, 2 * model.num_layers)
        yield from _pairs("decoder.final_layernorm.read", f"model.layers.{last}.contraction", reads)


def _pairs(ours: str, theirs: str, parameters: tuple[StreamParameter, ...]) -> Iterator[ExportedTensor]:
    for own in parameters:
        yield ExportedTensor(f"{ours}.{own.name}", f"{theirs}.{own.name}", own.shape)
