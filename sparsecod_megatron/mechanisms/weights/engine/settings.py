"""Settings that all methods of weight sparsity share, and what a run cannot have beside any of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import choice, choices_of
from sparsecod_megatron.config.parameters import ParameterKind, ParameterTable
from sparsecod_megatron.mechanisms.weights.distribution import DISTRIBUTIONS
from sparsecod_megatron.mechanisms.weights.engine.places import MarkedMatrix, marked_matrices
from sparsecod_megatron.seams.mechanism import Folds, Mechanism
from sparsecod_megatron.seams.plugin import Plugin

KINDS = ("qkv", "attention_output", "mlp_input", "mlp_output")
"""Matrices that can have masks, as `model.init_std` calls them; those of experts are MLPs' too."""


@dataclass
class WeightMechanism(Mechanism):
    """A method over attention's and the MLPs' matrices: no embeddings, output layer, norms, biases, routers or gates.

    Attributes:
        needs_kinds: whether `kinds` must name one.
        holds_zeros: whether a weight stays at exactly zero in what the optimizer steps.
    """

    holds_zeros: ClassVar[bool] = True
    needs_kinds: ClassVar[bool] = True

    kinds: list[str] = choices_of(*KINDS, among=KINDS)
    """Which matrices have masks."""
    skip_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, that stay dense."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Settings that would revive dead weights or hide them, and masks that reach nothing."""
        name = f"mechanisms.{self.name}"
        for other in config.mechanisms.values():
            if other is self:
                break
            shared = set(range(config.model.num_layers)) - {*self.skip_layers, *getattr(other, "skip_layers", ())}
            if isinstance(other, WeightMechanism) and shared:
                layer = min(shared)
                yield (
                    f"{name}: beside mechanisms.{other.name}, and both act on layer {layer}; keep one, or name it in "
                    "skip_layers of one of them"
                )
        if config.optimizer.optimizer == "muon":
            yield f"optimizer.optimizer: muon, whose updates move every weight, with {name}; use adam"
        if config.precision.fp8_param_gather:
            why = "holds weights at an exact zero" if self.holds_zeros else "changes them for each pass"
            yield f"precision.fp8_param_gather: true, but {name} {why}; set it to false"
        if config.megatron.get("use_precision_aware_optimizer"):
            yield f"megatron.use_precision_aware_optimizer: true hides the fp32 weights from {name}; remove it"
        if self.needs_kinds and not self.kinds:
            yield f"{self.key('kinds')}: names none; name at least one of {', '.join(KINDS)}, or remove the mechanism"
        for layer in self.skip_layers:
            if not 0 <= layer < config.model.num_layers:
                last = config.model.num_layers - 1
                yield f"{self.key('skip_layers')}: {layer} is not a layer; give numbers from 0 to {last}"

    def marks(self, kind: ParameterKind) -> bool:
        """Whether parameters of a kind can be marked; a gate is drawn as queries are, but is not one of them."""
        return kind.init in self.kinds and kind.fp8 and kind.name != "attention_gate"

    def has_mask(self, kind: ParameterKind, layer: int) -> bool:
        """Whether those of layer `layer` (from 0) can."""
        return layer not in self.skip_layers and self.marks(kind)

    def matrices(self, table: ParameterTable) -> list[MarkedMatrix]:
        """All that can be marked, in the engine's order."""
        return marked_matrices(table, self.has_mask)

    def optimizer_bytes(self, kind: ParameterKind) -> int:
        """The marks."""
        return 1 if self.marks(kind) else 0

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> Any:
        """Share of weights with a mask that are not marked."""
        from sparsecod_megatron.mechanisms.weights.engine.live_statistics import LiveShare

        return LiveShare(plugin)

    def export(self, model: ModelConfig) -> Folds:
        """The weights that the model computes with: zeros are weights like others."""
        return Folds()


@dataclass
class CountedMechanism(WeightMechanism):
    """A method that leaves an exact number of weights of each matrix alive."""

    density: float = field(default=0.5, metadata={"above": 0, "maximum": 1})
    """Share of weights that live in the end, of all matrices with masks."""
    distribution: str = choice("uniform", "erk")
    """`uniform`: the same share in each matrix. `erk`: ∝ (rows + columns) / (rows · columns)."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And matrices without a live weight."""
        yield from super().problems(config)
        if not self.kinds:
            return
        matrices = self.matrices(table := ParameterTable.of(config))
        if not matrices:
            yield f"{self.key('skip_layers')}: names all layers; leave one out, or remove the mechanism"
        for shape in {
            matrix.row.shape for matrix, live in zip(matrices, self.live_counts(table), strict=True) if live == 0
        }:
            yield f"{self.key('density')}: {self.density} leaves no weight of {list(shape)} alive; raise it"

    def live_counts(self, table: ParameterTable) -> list[int]:
        """Number of live weights in each matrix in the end."""
        matrices = self.matrices(table)
        shapes = Counter(matrix.row.shape for matrix in matrices)
        densities = DISTRIBUTIONS[self.distribution](list(shapes.items()), self.density)
        return [round(densities[matrix.row.shape] * math.prod(matrix.row.shape)) for matrix in matrices]

    def dead_parameters(self, table: ParameterTable) -> int:
        """Number of weights that masks hold at zero in the end."""
        pairs = zip(self.matrices(table), self.live_counts(table), strict=True)
        return sum(matrix.size - live for matrix, live in pairs)
