"""Every schedule against its formula, at each step of a run, the warm-up's border and the end included."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError

PEAK, RATIO, WARMUP, DECAY, LAST = 2e-3, 0.1, 5, 40, 12
LOW = PEAK * RATIO


def scheduler(*overrides: str, groups: list[dict[str, Any]] | None = None) -> Any:
    """A schedule over groups that no optimizer holds."""
    select_backend()
    from sparsecod_megatron.train.schedule import build_scheduler

    settings = [
        f"optimizer.lr={PEAK}",
        f"schedule.min_lr_ratio={RATIO}",
        f"schedule.lr_warmup_steps={WARMUP}",
        f"train.train_steps={DECAY}",
    ]
    optimizer: Any = SimpleNamespace(param_groups=[{}] if groups is None else groups)
    return build_scheduler(load_config(None, [*settings, *overrides]), optimizer)


def between(fraction: float) -> float:
    return LOW + (PEAK - LOW) * fraction


def progress(step: int) -> float:
    return (step - WARMUP) / (DECAY - WARMUP)


def tail(step: int) -> float:
    return max(0.0, (step - (DECAY - LAST)) / LAST)


FORMULAS: dict[str, Callable[[int], float]] = {
    "cosine": lambda step: between(0.5 * (1 + math.cos(math.pi * progress(step)))),
    "linear": lambda step: between(1 - progress(step)),
    "inverse-square-root": lambda step: max(LOW, PEAK * math.sqrt(WARMUP / step)),
    "constant": lambda step: PEAK,
    "WSD linear": lambda step: between(1 - tail(step)),
    "WSD cosine": lambda step: between(0.5 * (1 + math.cos(math.pi * tail(step)))),
    "WSD exponential": lambda step: between(2 ** (1 - tail(step)) - 1),
    "WSD minus_sqrt": lambda step: between(1 - math.sqrt(tail(step))),
}


@pytest.mark.parametrize("style", FORMULAS)
def test_equals_the_formula(style: str) -> None:
    name, _, wsd = style.partition(" ")
    decay = (f"schedule.lr_wsd_decay_steps={LAST}", f"schedule.lr_wsd_decay_style={wsd}") if wsd else ()
    group: dict[str, Any] = {}
    schedule = scheduler(f"schedule.lr_decay_style={name}", *decay, groups=[group])
    from sparsecod_megatron.train.schedule import nominal_lr

    for step in range(1, DECAY + 4):
        schedule.step(increment=1)
        if step <= WARMUP:
            expected = PEAK * step / WARMUP
        elif step > DECAY and name != "constant":
            expected = LOW
        else:
            expected = FORMULAS[style](step)
        assert group["lr"] == pytest.approx(expected, rel=1e-12), step
        assert nominal_lr(schedule) == group["lr"]


def test_a_group_with_its_own_ends_follows_the_same_curve() -> None:
    groups: list[dict[str, Any]] = [{}, {"max_lr": PEAK / 4, "min_lr": LOW / 4}]
    schedule = scheduler(groups=groups)
    for _ in range(DECAY):
        schedule.step(increment=1)
        assert groups[1]["lr"] == pytest.approx(groups[0]["lr"] / 4, rel=1e-12)


def test_without_warm_up_the_first_step_is_below_the_peak() -> None:
    group: dict[str, Any] = {}
    scheduler("schedule.lr_warmup_steps=0", groups=[group]).step(increment=1)
    assert group["lr"] == pytest.approx(between(0.5 * (1 + math.cos(math.pi / DECAY))), rel=1e-12)


def test_decay_may_end_before_the_run() -> None:
    group: dict[str, Any] = {}
    scheduler("schedule.lr_decay_steps=20", groups=[group]).step(increment=21)
    assert group["lr"] == LOW


def test_wsd_needs_its_steps() -> None:
    with pytest.raises(ConfigError, match="lr_wsd_decay_steps: not set"):
        scheduler("schedule.lr_decay_style=WSD")


def test_a_reloaded_schedule_goes_on() -> None:
    first, second = {}, {}  # type: ignore[var-annotated]
    one = scheduler(groups=[first])
    one.step(increment=17)
    two = scheduler(groups=[second])
    two.load_state_dict(one.state_dict())
    for schedule in (one, two):
        schedule.step(increment=1)
    assert first == second
