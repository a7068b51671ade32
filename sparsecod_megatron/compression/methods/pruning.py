"""Pruning by a composed rule, `wanda+dsnot+cg`: weights become zero, the directory is a stock one.

The parts are in `rules.py`, the way through a model in `passes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.changes import eligible, holder
from sparsecod_megatron.compression.experts import is_fused
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.passes import Plan, prune_by_inputs, prune_by_weights
from sparsecod_megatron.compression.patterns import parse_pattern
from sparsecod_megatron.compression.rules import Options, make_rule
from sparsecod_megatron.config.fields import above, at_least, between, choice
from sparsecod_megatron.errors import ConfigError, ConversionError

BY_MATRIX = ("magnitude", "sparsegpt")
"""Rules whose shares are of whole matrices as published, while others' are of rows."""


@dataclass
class PruningSettings:
    """Which weights are pruned, and by what."""

    pattern: str = "0.5"
    """Share of weights to prune; n:m, which keeps n of every m; or group:g:share, whole groups of g neighbours."""
    per: str | None = field(default=None, metadata={"choices": ("matrix", "row")})
    """What the share refers to; None is `matrix` for magnitude and sparsegpt, `row` for others."""
    inputs: str = choice("sparse", "dense")
    """Which model's inputs a matrix sees: with the blocks before it pruned, or not."""
    order: str = choice("block", "true")
    """Whether the matrices of a block see it dense, or with those before them pruned, a pass for each stage."""
    allocation: str = choice("uniform", "influence")
    """Whether every block loses the same share, or more where it changes the stream less."""
    spread: float = between(0.0, 1.0, 0.2)
    """How far shares may differ by influence."""
    damping: float = above(0.0, 0.01)
    """Added to the diagonal of Σ x·xᵀ, as a share of its mean."""
    cg_steps: int = at_least(1, 20)
    """Steps of conjugate gradients."""
    cycles: int | None = at_least(1, None)
    """Swaps of a row by dsnot; None is 0.0122 of its width, at least one."""
    bits: int = between(2, 16, 4)
    """A weight's, by gqsa; 16 rounds nothing."""
    alpha: float | None = at_least(0.0, None)
    """Weight of gblm's gradients; None is 1, or 100 with `compat`."""
    compat: bool = False
    """The published scales of gblm, which depend on the loss and on the number of sequences."""
    output_error: bool = True
    """Measure how far every matrix's outputs move, also where the rule itself needs no Σ x·xᵀ."""
    seed: int = at_least(0, 0)
    """Seed of `random`."""


class Pruning(Method):
    """See the module."""

    name = "magnitude"
    Settings = PruningSettings

    def __init__(self, settings: PruningSettings, name: str = "magnitude") -> None:
        super().__init__(settings)
        self.name = name
        per = settings.per
        if per is None and (":" not in settings.pattern or settings.pattern.startswith("group:")):
            per = None if name.partition("+")[0] in BY_MATRIX else "row"
        options = Options(settings.damping, settings.cg_steps, settings.cycles, settings.bits)
        rule = make_rule(name, parse_pattern(settings.pattern, per), options)
        self.pattern = rule.pattern
        if settings.inputs == "dense" and settings.order == "true":
            raise ConfigError(f"--method {name}: order=true has no meaning with inputs=dense; leave one of them out")
        if settings.allocation == "influence" and self.pattern.of:
            raise ConfigError(f"--method {name}: {settings.pattern} leaves no share to allocate; give pattern=0.5")
        self.needs = Needs(calibration=True, gradients=rule.needs_gradients, whole_model=rule.needs_gradients)
        alpha = settings.alpha if settings.alpha is not None else 100.0 if settings.compat else 1.0
        self.plan = Plan(
            rule,
            inputs=settings.inputs,
            order=settings.order,
            spread=settings.spread if settings.allocation == "influence" else None,
            output_error=settings.output_error,
            alpha=alpha,
            compat=settings.compat,
            seed=settings.seed,
        )

    @classmethod
    def named(cls, name: str, settings: PruningSettings) -> Pruning:
        """The rule that the words between the `+` make."""
        return cls(settings, name)

    def compress(self, material: Material) -> Outcome:
        """Prune every matrix that `reason` has nothing against."""
        taken, plan = self.taken(material.model), self.plan
        runs = plan.rule.needs_inputs or plan.spread is not None
        has_text = material.sequences is not None and len(material.sequences) > 0
        if not runs and not (plan.output_error and has_text):
            prune_by_weights(material, plan, taken)
            return Outcome()
        try:
            notes = prune_by_inputs(material, plan, taken)
        except ConversionError as error:
            if runs or material.changes.has_begun:
                raise
            prune_by_weights(material, plan, taken)
            return Outcome(warnings=[f"output errors are not measured: {error}"])
        return Outcome(warnings=notes.warnings("magnitude"))

    def taken(self, model: PreTrainedModel) -> list[str]:
        """Names of the parameters that `obstacle` has nothing against."""
        return [name for name, weight in eligible(model) if not self.obstacle(holder(model, name), weight)]

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Routers, convolutions, gates of one output, and rows that the pattern does not divide are kept."""
        return self.obstacle(module, weight) or "it lies outside the model's blocks"

    def obstacle(self, module: nn.Module, weight: Tensor) -> str:
        """Why a matrix cannot follow the pattern, or nothing."""
        if not (isinstance(module, nn.Linear | Conv1D) or is_fused(module)):
            return "routers, convolutions and other weights outside linear layers"
        rows, columns = weight.shape[-2:] if not isinstance(module, Conv1D) else reversed(weight.shape)
        return "a gate of one output" if rows == 1 else self.pattern.obstacle(columns)
