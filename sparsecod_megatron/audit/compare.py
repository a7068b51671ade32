"""Compares a row with the one it must equal, and says what differs first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsecod_megatron.audit.measurement import Measurement
from sparsecod_megatron.audit.rows import Row
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences of two rows that compute the same; `inf` does not judge.

    Attributes:
        loss: limit on a step's loss.
        grad_norm: limit on a step's gradient norm.
        gradients: ‖a − b‖ / ‖b‖ of one tensor's gradient.
        statistics: limit on a layer statistic, over the largest of its name in any layer.
        state: ‖a − b‖ / ‖b‖ of one tensor of weights or one buffer, in the middle and at the end. One that began at
            zero consists of a few updates, which are as far apart as gradients are: it has their limit.
    """

    loss: float
    grad_norm: float
    gradients: float
    statistics: float
    state: float


EQUALITY = Tolerance(0.0, 0.0, 0.0, 0.0, 0.0)
"""The same arithmetic in the same order, on a CPU."""
FP32 = Tolerance(loss=1e-5, grad_norm=1e-4, gradients=1e-3, statistics=1e-3, state=1e-5)
"""Sums in another order. A right layout is a hundred times closer; a wrong one is off by the size of what it leaves out
or counts twice."""
BF16 = Tolerance(loss=2e-3, grad_norm=5e-2, gradients=0.25, statistics=0.25, state=2e-3)
"""A bf16 number has 8 bits, so that every product is off by up to 4e-3, and a router near a tie chooses otherwise. Rows
in fp32 show what is finer; these show what fp32 has not: weights apart from their master weights."""
MIN_NORM_SHARE = 1e-4
"""Share of the whole norm below which a tensor's own is rounding of others; smaller ones are measured by this."""
SHARE_FACTOR = 100.0
"""How much more a share of elements may differ: one element that rounding takes over its limit is a hundredth of it."""
LATE = ("grad_", "param_", "update_")
"""Prefixes of the names of statistics that follow from the gradients, not from the forward pass."""


@dataclass
class Verdict:
    """One row, compared.

    Attributes:
        row: its name.
        against: the row it must equal; None for a reference.
        nproc: processes.
        loss, grad_norm, statistics, state: largest relative difference.
        gradients: kind of tensor → largest relative difference of one.
        first: what differs first, in words; None where nothing does.
        losses: by step.
        once: what differed first with the first seed, where nothing does with the second; None otherwise.
    """

    row: str
    against: str | None
    nproc: int
    loss: float = 0.0
    grad_norm: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    statistics: float = 0.0
    state: float = 0.0
    first: str | None = None
    losses: list[float] = field(default_factory=list)
    once: str | None = None

    @property
    def red(self) -> bool:
        """Whether the row differs."""
        return self.first is not None

    def json(self) -> dict[str, Any]:
        """For audit.json; JSON has no infinity or NaN, so these are null."""
        content = {**dataclasses.asdict(self), "red": self.red}
        return _finite(content)


def column_of(row: ParameterKind) -> str:
    """The column of a kind of tensors: its name, and of vectors the group, all norms being one."""
    return row.name if len(row.shape) == 2 else row.group


def compare(
    row: Row, found: Measurement | str, expected: Measurement | str | None, *, table: ParameterTable, on_cpu: bool
) -> Verdict:
    """Judge one row. Local.

    Args:
        row: the row.
        found: what it did, or why it could not run.
        expected: the same of the row it must equal; None for a reference.
        table: of the model's parameters.
        on_cpu: whether equal arithmetic gives equal bits.
    """
    verdict = Verdict(row.name, row.against, row.layout.nproc)
    if isinstance(found, str):
        verdict.first = f"could not run: {found}"
        return verdict
    verdict.losses = found.losses
    if expected is None:
        if not all(map(math.isfinite, found.losses)):
            verdict.first = f"the reference's losses are non-finite: {found.losses}"
        return verdict
    if isinstance(expected, str):
        verdict.first = f"{row.against}, which it must equal, could not run"
        return verdict
    wide = FP32 if row.precision == "fp32" else BF16
    tolerance = EQUALITY if row.exact and on_cpu else wide
    for difference in _differences(found, expected, table):
        size, section = difference.size, difference.section
        if section == "gradients":
            verdict.gradients[difference.kind] = max(verdict.gradients.get(difference.kind, 0.0), size)
        else:
            setattr(verdict, section, max(getattr(verdict, section), size))
        limit = getattr(tolerance, difference.judged_as or section) * difference.scale
        if verdict.first is None and not size <= limit:
            verdict.first = f"{difference.what}, off by {size:.1e}"
    return verdict


@dataclass(frozen=True)
class _Difference:
    """Relative difference of one number or tensor.

    Attributes:
        section: field of `Verdict` and `Tolerance`.
        what: in words.
        size: relative.
        kind: the gradient's kind of tensor.
        scale: how many times the tolerance is allowed.
        judged_as: field of `Tolerance`, where it is not that of the section.
    """

    section: str
    what: str
    size: float
    kind: str = ""
    scale: float = 1.0
    judged_as: str = ""


def _differences(found: Measurement, expected: Measurement, table: ParameterTable) -> Iterator[_Difference]:
    """In the order in which a step makes them, so that the first that is wrong lies next to the fault."""
    for step in range(len(expected.losses)):
        where = f"step {step + 1}"
        statistics = list(_statistics(found.statistics[step], expected.statistics[step]))
        yield from (_statistic(where, *each) for each in statistics if not each[0].startswith(LATE))
        gradients = list(_tensors(found.gradients[step], expected.gradients[step]))
        for name, size in reversed(gradients):
            yield _Difference("gradients", f"{where}: gradient of {name}", size, column_of(table.find(name)))
        yield from (_statistic(where, *each) for each in statistics if each[0].startswith(LATE))
        for section, label, ours, theirs in (
            ("loss", "loss", found.losses[step], expected.losses[step]),
            ("grad_norm", "gradient norm", found.grad_norms[step], expected.grad_norms[step]),
        ):
            what = f"{where}: {label} {ours:.6g} instead of {theirs:.6g}"
            yield _Difference(section, what, _off(ours, theirs))
        for name, size in _tensors(found.states.get(step + 1, {}), expected.states.get(step + 1, {})):
            judged_as = "gradients" if _began_at_zero(name, table) else ""
            yield _Difference("state", f"{name} after {where}", size, judged_as=judged_as)


def _began_at_zero(name: str, table: ParameterTable) -> bool:
    """Whether a weight or its master was zero before the first step."""
    try:
        kind = table.find(name.partition(" (")[0])
    except LookupError:
        return False  # a buffer
    return kind.group == "biases" or (kind.group == "norms" and table.model.layernorm_zero_centered_gamma)


def _statistic(where: str, name: str, layer: int, size: float) -> _Difference:
    counted = SHARE_FACTOR if name.endswith("_outlier_frac") else 1.0
    return _Difference("statistics", f"{where}: {name} of layer {layer}", size, scale=counted)


def _tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """(name, ‖a − b‖ / ‖b‖) in the order of the forward pass; a tensor that one side lacks is infinitely off."""
    smallest = MIN_NORM_SHARE * math.hypot(*(float(tensor.norm()) for tensor in expected.values()))
    for name in [*expected, *(name for name in found if name not in expected)]:
        ours, theirs = found.get(name), expected.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            yield name, math.inf
        elif torch.equal(ours, theirs):
            yield name, 0.0
        else:
            size = float((ours - theirs).norm()) / max(float(theirs.norm()), smallest)
            yield name, size if math.isfinite(size) else math.inf


def _statistics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> Iterator[tuple[str, int, float]]:
    """(name, layer, relative difference); lists (tokens per expert) by their largest, infinite where one is absent."""
    largest: dict[str, float] = {}
    for layer in expected:
        for name, value in layer.items():
            largest[name] = max(largest.get(name, 0.0), *map(abs, _numbers(value)))
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in theirs.items():
            one, other = _numbers(ours.get(name, [])), _numbers(value)
            pairs = zip(one, other, strict=False)
            same_length = len(one) == len(other)
            size = max((_off(a, b, scale=largest[name]) for a, b in pairs), default=0.0)
            yield name, index, size if same_length else math.inf


def _numbers(value: Any) -> list[float]:
    return [float(each) for each in value] if isinstance(value, list) else [float(value)]


def _off(ours: float, theirs: float, scale: float | None = None) -> float:
    if ours == theirs:
        return 0.0
    size = abs(ours - theirs) / max(abs(theirs) if scale is None else scale, 1e-30)
    return size if math.isfinite(size) else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
