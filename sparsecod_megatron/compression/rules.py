"""A pruning rule as its name says it, `wanda+dsnot+cg`: a score makes the mask, later parts change mask or values.

A part is a function and a line in `FIRST_PARTS` or `LATER_PARTS`; `registry.py` has the words for `--help`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sparsecod_megatron.compression.groups import round_groups
from sparsecod_megatron.compression.patterns import Pattern
from sparsecod_megatron.compression.reconstruct import conjugate_gradients, sweep
from sparsecod_megatron.compression.scores import SCORES, Evidence
from sparsecod_megatron.compression.swaps import swap
from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class State:
    """A matrix on its way through a rule.

    Attributes:
        mask: bool `[out, in]`, True where a weight stays.
        values: float32 `[out, in]`, zero where the mask is False.
    """

    mask: Tensor
    values: Tensor


@dataclass(frozen=True)
class Options:
    """Numbers that the parts of a rule use.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to it.
        cg_steps: steps of conjugate gradients.
        cycles: swaps of a row; None is relative to its width.
        bits: of a weight, where a rule rounds.
    """

    damping: float
    cg_steps: int
    cycles: int | None
    bits: int


@dataclass(frozen=True)
class Part:
    """One word of a rule's name.

    Attributes:
        apply: makes or changes a matrix's state.
        inputs: whether it looks at inputs.
        gram: whether it needs Σ x·xᵀ.
        gradients: whether it needs the gradients of the loss.
        keeps_groups: whether weights that a pattern ties together stay so.
        width: neighbours that a plain share is of, for a part that works on groups.
        finish: changes the values `[out, in]` after all parts.
    """

    apply: Callable[[Evidence, Pattern, State | None, Options], State]
    inputs: bool = True
    gram: bool = False
    gradients: bool = False
    keeps_groups: bool = True
    width: int = 1
    finish: Callable[[Tensor, Pattern, Options], Tensor] | None = None


def _scored(name: str, evidence: Evidence, pattern: Pattern, _state: State | None, _options: Options) -> State:
    mask = pattern.keep(SCORES[name](evidence))
    return State(mask, evidence.weight * mask)


def _sparsegpt(evidence: Evidence, pattern: Pattern, _state: State | None, options: Options) -> State:
    values, mask = sweep(evidence.weight, evidence.inputs.hessian, pattern, damping=options.damping)
    return State(mask, values)


def _rounded(values: Tensor, pattern: Pattern, options: Options) -> Tensor:
    return round_groups(values, pattern.width, options.bits)


def _update(evidence: Evidence, _pattern: Pattern, state: State | None, options: Options) -> State:
    assert state is not None
    values, mask = sweep(evidence.weight, evidence.inputs.hessian, state.mask, damping=options.damping)
    return State(mask, values)


def _cg(evidence: Evidence, _pattern: Pattern, state: State | None, options: Options) -> State:
    assert state is not None
    how = {"damping": options.damping, "steps": options.cg_steps}
    hessian, mask = evidence.inputs.hessian, state.mask
    return State(mask, conjugate_gradients(evidence.weight, hessian, mask, state.values, **how))  # type: ignore[arg-type]


def _dsnot(evidence: Evidence, pattern: Pattern, state: State | None, options: Options) -> State:
    assert state is not None
    mask = swap(evidence.weight, state.mask, evidence.inputs, pattern, options.cycles)
    return State(mask, evidence.weight * mask)


FIRST_PARTS = {
    "magnitude": Part(partial(_scored, "magnitude"), inputs=False),
    "wanda": Part(partial(_scored, "wanda")),
    "gblm": Part(partial(_scored, "gblm"), gradients=True),
    "obs": Part(partial(_scored, "obs"), gram=True),
    "random": Part(partial(_scored, "random"), inputs=False),
    "sparsegpt": Part(_sparsegpt, gram=True),
    "gqsa": Part(partial(_scored, "obs"), gram=True, width=16, finish=_rounded),
}
"""Make a mask."""
LATER_PARTS = {
    "dsnot": Part(_dsnot, keeps_groups=False),
    "update": Part(_update, gram=True),
    "cg": Part(_cg, gram=True),
}
"""Change it or the values: `dsnot` begins again from the dense values, the other two leave the mask."""


@dataclass(frozen=True)
class Rule:
    """What is done to every matrix.

    Attributes:
        name: its words, joined by `+`.
        parts: in order.
        pattern: of the mask.
        options: numbers of the parts.
    """

    name: str
    parts: tuple[Part, ...]
    pattern: Pattern
    options: Options

    @property
    def needs_inputs(self) -> bool:
        """Whether it prunes by more than the weights."""
        return any(part.inputs for part in self.parts)

    @property
    def needs_gram(self) -> bool:
        """Whether it needs Σ x·xᵀ."""
        return any(part.gram for part in self.parts)

    @property
    def needs_gradients(self) -> bool:
        """Whether it needs the gradients of the loss."""
        return any(part.gradients for part in self.parts)

    def prune(self, evidence: Evidence, pattern: Pattern) -> Tensor:
        """New weights `[out, in]`, float32, of one matrix."""
        state: State | None = None
        for part in self.parts:
            state = part.apply(evidence, pattern, state, self.options)
        assert state is not None
        values = state.values
        for part in self.parts:
            values = part.finish(values, pattern, self.options) if part.finish else values
        return values


def make_rule(name: str, pattern: Pattern, options: Options) -> Rule:
    """A rule by its name.

    Raises:
        ConfigError: a word that is unknown or in the wrong place, or a part and a pattern that do not fit.
    """
    first, *later = name.split("+")
    if first not in FIRST_PARTS:
        raise ConfigError(f"--method {name}: {first!r} makes no mask; begin with one of {', '.join(FIRST_PARTS)}")
    width = FIRST_PARTS[first].width
    if width > 1 and pattern.of:
        raise ConfigError(f"--method {name}: n:m has no groups to round; give pattern=0.5 or group:{width}:0.5")
    if width == 1 and not pattern.sparsity:
        raise ConfigError(f"--method {name}: a share of 0 prunes nothing; give one above 0")
    if pattern.width == 1:
        pattern = replace(pattern, width=width)
    for word in later:
        if word not in LATER_PARTS:
            raise ConfigError(f"--method {name}: {word!r} cannot follow a +; use {', '.join(LATER_PARTS)}")
        if pattern.width > 1 and not LATER_PARTS[word].keeps_groups:
            raise ConfigError(f"--method {name}: {word} moves weights out of groups of {pattern.width}; leave it out")
    parts = (FIRST_PARTS[first], *(LATER_PARTS[word] for word in later))
    return Rule(name, parts, pattern, options)
