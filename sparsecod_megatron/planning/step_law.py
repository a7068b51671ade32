"""Learning rate and batch that Step Law suggests for a run, and how far the run is from them.

Source: Li et al., "Predictable Scale: Part I, Step Law" (arXiv 2503.04715): lr = 1.79 N^−0.713 D^0.307 and a batch of
0.58 D^0.571 tokens, for N parameters outside of embeddings and D tokens. Fitted to AdamW with a smallest rate of 1e-5,
to models of 60M to 1.1B parameters on 2B to 100B tokens; they found it to hold for mixtures of experts too, whose N is
taken here with all experts (whether they count the idle ones is not said where we looked).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterCount

LR_FACTOR, LR_PARAMETERS, LR_TOKENS = 1.79, -0.713, 0.307
BATCH_FACTOR, BATCH_TOKENS = 0.58, 0.571
SMALLEST_RATE = 1e-5
"""Learning rate that their schedules end at."""
PARAMETERS_SEEN, TOKENS_SEEN = (60e6, 1.1e9), (2e9, 100e9)
"""Smallest and largest that the law was fitted to."""


@dataclass(frozen=True)
class Suggestion:
    """What the law says of a run.

    Attributes:
        parameters: N, all outside of embeddings and output layer.
        tokens: D, of all steps at the full batch.
        lr: suggested peak learning rate.
        batch_tokens: suggested tokens of a step.
        lr_ratio: the run's learning rate over it.
        batch_ratio: the run's tokens of a step over it.
        caveats: what the law was not fitted to.
    """

    parameters: int
    tokens: int
    lr: float
    batch_tokens: float
    lr_ratio: float
    batch_ratio: float
    caveats: tuple[str, ...]

    @property
    def text(self) -> str:
        """One line."""
        ratios = f"{self.lr:.2e} (the run's is {self.lr_ratio:.2g} times that)"
        batch = f"{self.batch_tokens:,.0f} tokens (the run's is {self.batch_ratio:.2g} times that)"
        caveats = f"; beyond what it was fitted to: {', '.join(self.caveats)}" if self.caveats else ""
        return f"suggests lr {ratios} and a batch of {batch}{caveats}"


def step_law(config: RunConfig, count: ParameterCount) -> Suggestion:
    """Suggestion for a run.

    Args:
        config: of the run.
        count: its parameters.
    """
    batch = config.train.global_batch_size * config.data.seq_length
    parameters, tokens = count.total - count.embedding, config.train.train_steps * batch
    lr = LR_FACTOR * parameters**LR_PARAMETERS * tokens**LR_TOKENS
    batch_tokens = BATCH_FACTOR * tokens**BATCH_TOKENS
    return Suggestion(
        parameters=parameters,
        tokens=tokens,
        lr=lr,
        batch_tokens=batch_tokens,
        lr_ratio=config.optimizer.lr / lr,
        batch_ratio=batch / batch_tokens,
        caveats=(*_extrapolations(parameters, tokens), *_differences(config)),
    )


def _extrapolations(parameters: int, tokens: int) -> list[str]:
    found = []
    for name, value, (low, high) in (("N", parameters, PARAMETERS_SEEN), ("D", tokens, TOKENS_SEEN)):
        if not low <= value <= high:
            side = f"below {low:.2g}" if value < low else f"above {high:.2g}"
            found.append(f"{name} {value:.2g} is {side}")
    return found


def _differences(config: RunConfig) -> list[str]:
    found = []
    if config.optimizer.optimizer != "adam":
        found.append(f"optimizer {config.optimizer.optimizer}")
    smallest = config.schedule.min_lr_ratio * config.optimizer.lr
    if abs(smallest - SMALLEST_RATE) > 0.01 * SMALLEST_RATE:
        found.append(f"a smallest rate of {smallest:.2g}, not {SMALLEST_RATE:g}")
    if config.train.rampup_batch_size is not None:
        found.append("a batch that grows (D is that of the full batch)")
    return found
