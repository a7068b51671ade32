"""Held-out samples of a synthetic task (docs/SYNTHETIC.md) as items, for runs that were trained on it."""

from __future__ import annotations

import numpy as np
import torch

from sparsecod_megatron.analysis.tasks.items import Items
from sparsecod_megatron.data.synthetic.dataset import SyntheticDataset
from sparsecod_megatron.data.synthetic.task import Task

SYNTHETIC = "synthetic"
"""Name of the task that a run was trained on."""


def synthetic_items(task: Task, *, seq_length: int, count: int, seed: int) -> Items:
    """The first held-out samples.

    Args:
        task: with its settings.
        seq_length: tokens of a sample.
        count: number of samples.
        seed: of their order; 0 are those of validation.
    """
    dataset = SyntheticDataset(task, seq_length=seq_length, seed=seed, length=count, held_out=True)
    samples = [dataset.sample(index) for index in range(count)]
    tokens, labels, is_answer = (np.stack(part) for part in zip(*samples, strict=True))
    difficulty = np.stack([task.difficulty(sample) for sample in samples])
    known, level = np.unique(difficulty[is_answer], return_inverse=True)
    levels = np.full(tokens.shape, -1)
    levels[is_answer] = level.reshape(-1)
    lengths = torch.full((count,), seq_length)
    read, said, level_of = (
        torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in (tokens, labels, levels)
    )
    return Items(SYNTHETIC, read, said, level_of, lengths, tuple(known.tolist()))
