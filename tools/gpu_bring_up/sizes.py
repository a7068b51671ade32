"""How large things are on a card, and in a rehearsal on one core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of what the steps train.

    Attributes:
        nano: overrides of the small configurations that `commands` trains.
        halfway: step at which their runs are stopped and resumed.
        last: their last step.
        speed: overrides of dense_1B.yaml.
        speed_steps: steps of each precision.
        speed_warm_up: steps of these that are not measured.
        overhead_steps: of each way to collect statistics.
        hidden: channels of the kernel checks.
    """

    nano: tuple[str, ...]
    halfway: int
    last: int
    speed: tuple[str, ...]
    speed_steps: int
    speed_warm_up: int
    overhead_steps: int
    hidden: int


SPEED = ("data.seq_length=4096", "train.global_batch_size=8", "train.micro_batch_size=8")
CARD = Sizes(
    nano=("precision.dtype=bf16",),
    halfway=20,
    last=30,
    speed=SPEED,
    speed_steps=40,
    speed_warm_up=15,
    overhead_steps=40,
    hidden=1024,
)
_REHEARSAL_MODEL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
)
REHEARSAL = Sizes(
    nano=(*_REHEARSAL_MODEL, "data.seq_length=32"),
    halfway=2,
    last=3,
    speed=(*_REHEARSAL_MODEL, "data.seq_length=32", "model.vocab_size=512", "optimizer.lr=1e-2"),
    speed_steps=3,
    speed_warm_up=1,
    overhead_steps=2,
    hidden=64,
)


def sizes(cuda: bool) -> Sizes:
    """Those of this machine."""
    return CARD if cuda else REHEARSAL
