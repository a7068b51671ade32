"""A corpus repeated for as long as needed, in an order that does not depend on how long that is.

Megatron shuffles all epochs of a run together, so that their number, and with it `train.train_steps`, decides which
sample comes when: a run that is resumed with more steps would see other data. Here a corpus is a chain of blocks of
1, 1, 2, 4, … epochs, each with its own shuffle and its own sample index; a longer run only adds blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_blocks(num_tokens: int, seq_length: int, num_samples: int) -> Iterator[int]:
    """Samples of each block, until they hold `num_samples`.

    Args:
        num_tokens: in the corpus, at least `seq_length + 1`.
        seq_length: tokens of a sample; its labels need one more.
        num_samples: to hold at least.
    """
    epochs, held = 1, 0
    while held < num_samples:
        size = (epochs * num_tokens - 1) // seq_length
        yield size
        epochs, held = (1 if held == 0 else 2 * epochs), held + size


def block_seed(seed: int, block: int) -> int:
    """Seed of a block's shuffle; the first block has the run's own, and so Megatron's order of a single epoch."""
    return seed if block == 0 else int(np.random.SeedSequence([seed, block]).generate_state(1)[0])
