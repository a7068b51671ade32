"""How much is sparse at which step: pure functions of a run's progress, with nothing to keep in a checkpoint."""

from __future__ import annotations

import math

from sparsecod_megatron.seams.plugin import StepContext

RAMPS = {"cubic": 3, "linear": 1}
"""Ways from dense to sparse, and the power of what is left of the way."""


def ramp(progress: float, *, start: float, end: float, kind: str) -> float:
    """Share of the final sparsity that is reached: 0 up to `start`, 1 from `end` on, 1 − (1 − u)³ between (cubic).

    Args:
        progress: share of the steps.
        start: of the way, the same unit.
        end: of it.
        kind: of `RAMPS`.

    Source: Zhu & Gupta, To Prune, or Not to Prune (arXiv 1710.01878).
    """
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return float(1 - (1 - (progress - start) / (end - start)) ** RAMPS[kind])


def steps_of_compute(start: float, end: float, *, sparsity: float, kind: str) -> tuple[float, float]:
    """From shares of a run's compute to shares of its steps, compute being proportional to the weights that live.

    With C the mean share of live weights, the dense steps are start · C, those of the ramp, on which 1 − m · sparsity
    live on average (m: 3/4 for cubic, 1/2 for linear), (end − start) · C / (1 − m · sparsity), and those behind it
    (1 − end) · C / (1 − sparsity); C follows because all are the whole.

    Args:
        start: share of the compute before the ramp.
        end: share of it at the end of the ramp.
        sparsity: final share of dead weights, below 1.
        kind: of `RAMPS`.

    Source: Jin et al., The Journey Matters (arXiv 2501.12486) counts so; the closed form is ours.
    """
    power = RAMPS[kind]
    mean = power / (power + 1)
    first, ramped, last = start, (end - start) / (1 - mean * sparsity), (1 - end) / (1 - sparsity)
    compute = 1 / (first + ramped + last)
    return first * compute, (first + ramped) * compute


def step_of_share(share: float, context: StepContext) -> int:
    """The first step at which a share of the run's is reached; at least 1."""
    return max(1, math.ceil(share * context.last_step))


def is_choice(step: int, *, first: int, last: int, interval: int) -> bool:
    """Whether a step chooses that has to do so every `interval` steps from `first` on, and finally at `last`."""
    return step == last or (first <= step < last and (step - first) % interval == 0)


def cosine_share(step: int, *, stop: float, first: float) -> float:
    """Share of the live weights that is replaced at a step: falls from `first` at step 0 to 0 at step `stop`.

    Source: Evci et al., Rigging the Lottery (arXiv 1911.11134).
    """
    return first / 2 * (1 + math.cos(math.pi * min(step / stop, 1.0)))
