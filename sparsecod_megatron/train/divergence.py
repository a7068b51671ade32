"""Decides, on all ranks alike and before the weights change, whether a step's update is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsecod_megatron.config import TrainConfig
from sparsecod_megatron.errors import SparsecodError
from sparsecod_megatron.train.spikes import SpikeMonitor


class DivergenceError(SparsecodError, ArithmeticError):
    """Loss or gradient is no longer a number; raised on all ranks alike, before the weights change."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one step, the same on every rank.

    Attributes:
        update: whether the weights change.
        diverged: loss or gradient norm is NaN or infinite.
        spike: either is far above the steps before.
    """

    update: bool = True
    diverged: bool = False
    spike: bool = False


def require_finite(loss: float, grad_norm: float) -> Verdict:
    """The judge of a step without policy. Local.

    Raises:
        DivergenceError: loss or gradient norm is NaN or infinite.
    """
    if not _finite(loss, grad_norm):
        raise DivergenceError(f"loss {loss}, gradient norm {grad_norm}; lower optimizer.lr or look at the data")
    return Verdict()


class UpdateJudge:
    """Judges the steps of a run by its policy, each rank for itself: all of them see the same numbers.

    Args:
        train: `on_divergence`, `max_divergences` and `spike_*`.
        state: what an earlier part of the run left (`state()`), or nothing.
    """

    def __init__(self, train: TrainConfig, state: Mapping[str, Any]) -> None:
        self._train = train
        self._spikes = SpikeMonitor(("loss", "grad_norm"), window=train.spike_window, threshold=train.spike_threshold)
        self._spikes.restore(state.get("window", {}))
        self._skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
        self._rollbacks = (-1, 0)

    def __call__(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step. Local.

        Args:
            loss: loss of the global batch.
            grad_norm: gradient norm of the whole gradient, before clipping.

        Raises:
            DivergenceError: the policy is to stop, or has left out as many updates in a row as it may.
        """
        diverged = not _finite(loss, grad_norm)
        spike = not diverged and self._spikes.observe({"loss": loss, "grad_norm": grad_norm})
        if diverged:
            self._refuse_divergence(loss, grad_norm)
        left = self._skipped_in_a_row < self._train.max_divergences
        update = not diverged and not (spike and self._train.spike_skip and left)
        self._skipped_in_a_row = 0 if update else self._skipped_in_a_row + 1
        return Verdict(update=update, diverged=diverged, spike=spike)

    def rolled_back(self, step: int) -> None:
        """Count a return to the checkpoint of `step`. Local.

        Raises:
            DivergenceError: as many led to the same checkpoint as may.
        """
        earlier, times = self._rollbacks
        self._rollbacks = (step, times + 1 if step == earlier else 1)
        if self._rollbacks[1] > self._train.max_divergences:
            raise DivergenceError(
                f"diverged {times + 1} times after the checkpoint of step {step} (train.max_divergences); "
                "lower optimizer.lr or look at the data"
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {"window": self._spikes.state(), "skipped_in_a_row": self._skipped_in_a_row}

    def _refuse_divergence(self, loss: float, grad_norm: float) -> None:
        policy, limit = self._train.on_divergence, self._train.max_divergences
        if policy == "stop":
            require_finite(loss, grad_norm)
        if policy == "skip" and self._skipped_in_a_row >= limit:
            raise DivergenceError(
                f"{self._skipped_in_a_row + 1} steps in a row diverged (train.max_divergences={limit}), the last with "
                f"loss {loss}, gradient norm {grad_norm}; lower optimizer.lr or set train.on_divergence=rollback"
            )


def _finite(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm)
