"""What the contract test sets of each mechanism in a small model, and which of them run together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A mechanism in the small model of `tests/helpers/megatron.py`.

    Attributes:
        settings: overrides that switch it on, with an effect in every layer.
        neutral: overrides that switch it on without an effect; empty where none can.
        experts: whether it has an effect of its own in a mixture of experts.
    """

    settings: tuple[str, ...]
    neutral: tuple[str, ...] = ()
    experts: bool = False


CASES: dict[str, Case] = {
    "headwise_gate": Case(("mechanisms.headwise_gate={}",)),
    "sparse_weights": Case(
        ("mechanisms.sparse_weights.density=0.4", "mechanisms.sparse_weights.distribution=erk"),
        neutral=("mechanisms.sparse_weights.density=1",),
        experts=True,
    ),
    "topk_activation": Case(
        ("mechanisms.topk_activation.k_per_layer=[4,10,20,4]", "model.activation=relu"),
        neutral=("mechanisms.topk_activation.k=48",),
        experts=True,
    ),
}
TOGETHER: dict[str, tuple[str, ...]] = {"gate-masks-topk": ("headwise_gate", "sparse_weights", "topk_activation")}
"""Mechanisms that do not touch each other, by name of the run: one training for all."""


def settings(names: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides of a run with these mechanisms."""
    return tuple(override for name in names for override in CASES[name].settings)
