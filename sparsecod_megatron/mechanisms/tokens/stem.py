"""STEM: in some layers a table that the token itself looks up stands in place of the MLP's up projection.

    y = W_down (act(W_gate x) ⊙ U[token]),   U [V, F] of each layer

There is no routing and no loss of its own: a token reads one row of F numbers, and its layer spends 2 · F · H FLOPs
less in a forward pass, for V · F parameters in place of F · H. The table is split by columns over tensor-parallel
ranks, as the gate's rows are, so a look-up needs no communication. Its gradient is dense, and reduced over
data-parallel ranks like any other: with a large vocabulary that is most of their traffic (`sparsecod plan`).

Source: Sadhukhan et al., STEM: Scaling Transformers with Embedding Modules (arXiv 2601.10639): the formula, and that
the first layer stays dense. Initial values were not found there; a row is drawn with the standard deviation that
W_up x has, √H times an up projection's, so that a fresh layer passes on as much as a dense one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.tokens.layer import ReadsTokens, token_layer
from sparsecod_megatron.mechanisms.tokens.settings import small_layers, token_problems
from sparsecod_megatron.mechanisms.tokens.table import TokenTable
from sparsecod_megatron.seams.mechanism import ExportedTensor, LayerSite, Mechanism, Module, RankShape, mixed

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

PLAIN = "mlp_input"
"""Row of the plain table of parameters that a STEM layer has not: gate over up projection."""


@dataclass
class Stem(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "stem"
    shapes_weights: ClassVar[bool] = True
    unfused: ClassVar[tuple[str, ...]] = ("mlp",)

    layers: list[int] | None = None
    """Layers (from 0) with a table; null: every second one, from the second."""

    def in_layers(self, model: ModelConfig) -> list[int]:
        """Layers (from 0) with a table, in ascending order where all is right."""
        if self.layers is not None:
            return self.layers
        return [layer for layer in range(1, model.num_layers, 2) if not model.is_moe_layer(layer)]

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Layers that it cannot be in, and mechanisms of the same matrix."""
        model, layers = config.model, self.in_layers(config.model)
        yield from token_problems(self, config, layers)
        if not model.is_gated:
            yield f"model.activation: {model.activation} has no up projection for mechanisms.stem; use swiglu or geglu"
        if model.mlp_bias:
            yield "model.mlp_bias: true, but the tables of mechanisms.stem have none; remove it"
        for layer in (layer for layer in layers if 0 <= layer < model.num_layers and model.is_moe_layer(layer)):
            yield f"{self.key('layers')}: {layer} is a mixture of experts, but tables are for dense MLPs; leave it out"
        for other in config.mechanisms.values():
            left_out = getattr(other, "skip_layers", ())
            both = [layer for layer in layers if layer not in left_out]
            if PLAIN in getattr(other, "kinds", ()) and both:
                yield (
                    f"mechanisms.{other.name}.kinds: {PLAIN} of layer {both[0]} has mechanisms.stem too; leave the "
                    "kind or the layer out of one of them"
                )

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """The table."""
        if layer in self.in_layers(model):
            assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
            yield ParameterKind(
                "stem_table",
                (model.vocab_size, model.ffn_hidden_size),
                r"mlp\.linear_fc1\.table\.weight",
                "embeddings",
                PLAIN,
                "tensor",
                1,
                looked_up=True,
                rows_read=1,
                channels="model.ffn_hidden_size",
            )

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """The gate alone of what stands above the other in one matrix."""
        if kind.name != PLAIN or layer not in self.in_layers(model):
            return (kind,)
        shape = kind.shape[0] // 2, kind.shape[1]
        return (dataclasses.replace(kind, name="stem_gate", shape=shape, pattern=_GATE, stacked=1),)

    @torch.no_grad()
    def initialize(self, chunk: GPTModel, shards: Mapping[Any, Any], seed: int) -> None:
        """Scale the tables, which have been drawn as matrices of the MLP's input."""
        from sparsecod_megatron.model.init import standard_deviation

        for layer in chunk.decoder.layers:
            number, linear = layer.layer_number - 1, getattr(layer.mlp, "linear_fc1", None)
            if not isinstance(linear, GateAndTable) or linear.table.weight not in shards:
                continue
            table, model = linear.table.weight, linear.model
            plain = next(kind for kind in ParameterTable(model).plain_layer(number) if kind.name == PLAIN)
            drawn = shards[table].matrix
            std, projection = (
                standard_deviation(model, matrix) for matrix in (drawn, dataclasses.replace(drawn, row=plain))
            )
            if std:
                table.mul_(projection * math.sqrt(model.hidden_size) / std)

    def layers_differ(self, model: ModelConfig) -> bool:
        """Layers without a table have another matrix."""
        return True

    def token_halo(self, model: ModelConfig) -> int:
        """A token's own id."""
        return 0

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """A gate and a table in the place of the MLP's input projection."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        if site.layer not in self.in_layers(site.model):
            return spec
        mlp = spec.submodules.mlp
        linear = ModuleSpec(_input(), {"linear": mlp.submodules.linear_fc1, "model": site.model})
        mlp.submodules = dataclasses.replace(mlp.submodules, linear_fc1=linear)
        return token_layer(spec)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Which rows were read; gate and rows are kept together, as a projection's output is."""
        return {"stem_rows": rank.tokens * 8} if layer in self.in_layers(model) else {}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Stem:
        """Layers at the same depths."""
        if self.layers is None:
            return self
        layers = small_layers(self.layers, model, small)
        return dataclasses.replace(self, layers=[layer for layer in layers if not small.is_moe_layer(layer)])

    def export(self, model: ModelConfig) -> Module:
        """A gate projection and an embedding in the MLP."""
        assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
        tensors: list[ExportedTensor] = []
        for layer in self.in_layers(model):
            ours, theirs = f"decoder.layers.{layer}.mlp.linear_fc1", f"model.layers.{layer}.mlp"
            gate, table = (model.ffn_hidden_size, model.hidden_size), (model.vocab_size, model.ffn_hidden_size)
            tensors.append(ExportedTensor(f"{ours}.gate.weight", f"{theirs}.gate_proj.weight", gate))
            tensors.append(ExportedTensor(f"{ours}.table.weight", f"{theirs}.up_table.weight", table))
        return Module(
            code=Path(__file__).with_name("stem_sparsecod.py"),
            settings={"layers": self.layers},
            tensors=tuple(tensors),
            replaced=frozenset(f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in self.in_layers(model)),
        )


_GATE = r"mlp\.linear_fc1\.gate\.weight"


def _input() -> type:
    """`GateAndTable` as a module of Megatron-Core's, which is there once a backend has been chosen."""
    from megatron.core.transformer.module import MegatronModule

    return mixed(GateAndTable, MegatronModule)


class GateAndTable(ReadsTokens):
    """What an MLP's input projection becomes: [W_gate x, U[token]], side by side as the activation reads them.

    Args:
        input_size: H.
        output_size: 2 F, of gate and rows together.
        config: Megatron-Core's configuration of the model.
        linear: column-parallel linear layer, class or spec.
        model: our configuration of the model.
        tp_group: ranks that share the channels.
        stride: of gate over up projection; the gate alone has none.
        **options: the linear layer's others.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        linear: Any,
        model: ModelConfig,
        tp_group: torch.distributed.ProcessGroup,
        stride: int,
        **options: Any,
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        super().__init__(config)  # type: ignore[call-arg]
        assert model.vocab_size is not None
        self.model, self.tp_group = model, tp_group
        width = output_size // 2
        self.gate = build_module(linear, input_size, width, config=config, tp_group=tp_group, **options)
        self.table = TokenTable(config, model.vocab_size, width, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[S_local, B, H] → [S, B, 2 F/TP], S all that the tensor-parallel ranks hold of the sequence."""
        gate, _ = self.gate(x)
        return torch.cat((gate, self.table(self.own_ids(len(gate)))), dim=-1), None
