"""A synthetic task as what training reads: samples by their number, a tokenizer, and a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset

from sparsecod_megatron.data.synthetic.task import END_OF_TEXT, Draw, Sample, Task, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DIGESTED = 8
"""Samples in a fingerprint: enough to notice that another version makes others."""


class SyntheticDataset(Dataset[dict[str, torch.Tensor]]):
    """`length` samples of a task.

    Args:
        task: with its settings.
        seq_length: S, tokens of a sample.
        seed: of the order of samples.
        length: number of samples; a larger one only continues where a smaller one ends.
        held_out: those of validation.
    """

    def __init__(self, task: Task, *, seq_length: int, seed: int, length: int, held_out: bool) -> None:
        self._task, self._seq_length, self._seed, self._length = task, seq_length, seed, length
        self._held_out = held_out

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32, 1 at answers), each `[S]`."""
        sample = self.sample(index)
        return {
            "tokens": torch.from_numpy(sample.tokens),
            "labels": torch.from_numpy(sample.labels),
            "loss_mask": torch.from_numpy(sample.is_answer.astype(np.float32)),
            "position_ids": torch.arange(self._seq_length),
        }

    def sample(self, index: int) -> Sample:
        """The sample at this place of the run."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        if not self._held_out and (epoch_length := self._task.num_samples):
            epoch, place = divmod(index, epoch_length)
            index = int(shuffled(epoch_length, self._seed, epoch)[place])
        return self._task.make(Draw(self._seed, index, self._held_out), self._seq_length)


def task_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer of the task's vocabulary, whose texts are its words with spaces between them."""
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(task.vocabulary())}
    ids.setdefault(END_OF_TEXT, len(ids))
    backend = Tokenizer(models.WordLevel(ids, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def synthetic_fingerprint(task: Task, *, seq_length: int, seed: int) -> dict[str, str]:
    """Everything that decides which samples come when, among them a digest of the first. Local.

    Args:
        task: with its settings.
        seq_length: tokens of a sample.
        seed: of the order of samples.
    """
    dataset = SyntheticDataset(task, seq_length=seq_length, seed=seed, length=_DIGESTED, held_out=False)
    digest = hashlib.sha256()
    for index in range(_DIGESTED):
        for part in dataset.sample(index):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    settings = json.dumps(dataclasses.asdict(task))
    return {
        "data.seq_length": str(seq_length),
        "train.seed": str(seed),
        "data.synthetic": f"{type(task).__name__} {settings}",
        "first samples": digest.hexdigest()[:16],
    }
