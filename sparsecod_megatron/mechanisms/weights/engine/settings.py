"""Settings that all methods of weight sparsity share, and what a run cannot have beside any of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import choice, choices_of
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.distribution import DISTRIBUTIONS
from sparsecod_megatron.mechanisms.weights.engine.places import MarkedMatrix, idle_products, marked_matrices
from sparsecod_megatron.mechanisms.weights.engine.schedules import step_of_share
from sparsecod_megatron.seams.mechanism import Folds, Mechanism, latent_conflict
from sparsecod_megatron.seams.plugin import Plugin, StepContext

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
        yield from qkv_problems(self, self.kinds, config.model)
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

    @property
    def zeroed_from(self) -> float:
        """Share of the steps after which weights without life are zeros; until then all live."""
        return 0.0

    def is_zeroing(self, context: StepContext) -> bool:
        """Whether a step's marks mean zeros."""
        return self.zeroed_from == 0 or context.step >= step_of_share(self.zeroed_from, context)

    def share(self, context: StepContext) -> float:
        """How much of the way to the final density has been gone at a step."""
        return 1.0

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """Number of weights of each matrix that the model computes with after a step, if every step chose."""
        raise NotImplementedError

    def dead_parameters(self, table: ParameterTable) -> int:
        """Number of weights that the model computes without in the end."""
        sizes = sum(matrix.size for matrix in self.matrices(table))
        return sizes - round(sum(self.live_counts(table, StepContext(1, 1))))

    def idle_products(self, table: ParameterTable, context: StepContext) -> float:
        """Those with weights that do not live after a step."""
        return idle_products(self.matrices(table), self.live_counts(table, context))

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
            matrix.row.shape for matrix, live in zip(matrices, self.final_counts(table), strict=True) if live == 0
        }:
            yield f"{self.key('density')}: {self.density} leaves no weight of {list(shape)} alive; raise it"

    def final_counts(self, table: ParameterTable) -> list[int]:
        """Number of live weights in each matrix once all of the way has been gone."""
        matrices = self.matrices(table)
        shapes = Counter(matrix.row.shape for matrix in matrices)
        densities = DISTRIBUTIONS[self.distribution](list(shapes.items()), self.density)
        return [round(densities[matrix.row.shape] * math.prod(matrix.row.shape)) for matrix in matrices]

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """By the share of the way; with a global scope as if every matrix had its share."""
        share = self.share(context) if self.is_zeroing(context) else 0.0
        pairs = zip(self.matrices(table), self.final_counts(table), strict=True)
        return [matrix.size - round(share * (matrix.size - live)) for matrix, live in pairs]


def qkv_problems(mechanism: Mechanism, kinds: Sequence[str], model: ModelConfig) -> Iterator[str]:
    """The line of kinds with `qkv` beside latent attention, some of whose projections are whole on each rank."""
    if "qkv" in kinds:
        others = ", ".join(kind for kind in kinds if kind != "qkv")
        why = f"has `qkv` of ordinary attention alone; set {mechanism.key('kinds')}=[{others}]"
        yield from latent_conflict(mechanism, model, why)
