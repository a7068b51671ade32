"""Items of a task as tensors: what a model reads, which places are answers, and how difficult each is.

Items are padded behind their end to one length. Causal models compute the same in front of it, so an item's numbers do
not depend on the others of its micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_megatron.errors import ConfigError, DataError


class Answered(NamedTuple):
    """A prompt and its answer in tokens.

    Attributes:
        ids: both, one after the other.
        start: place of the answer's first token in `ids`, at least 1.
        difficulty: a whole number; larger is harder.
    """

    ids: list[int]
    start: int
    difficulty: int


@dataclass(frozen=True)
class Items:
    """N items of one task.

    Attributes:
        name: of the task.
        tokens: int64 [N, T] inputs, on the CPU.
        labels: int64 [N, T] what is to be said at each place; of no meaning where nothing is asked.
        level: int64 [N, T] index into `difficulties` where an answer's token is asked for, −1 elsewhere. Neighbouring
            places are one answer.
        lengths: int64 [N] inputs of each item; what follows is padding.
        difficulties: the difficulties that there are, ascending.
    """

    name: str
    tokens: Tensor
    labels: Tensor
    level: Tensor
    lengths: Tensor
    difficulties: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def windows(self) -> Tensor:
        """[N, T + 1] inputs with the last label behind them, as samples of text are kept."""
        return torch.cat((self.tokens, self.labels[:, -1:]), dim=1)

    @property
    def is_told(self) -> Tensor:
        """bool [N, T]: tokens where nothing is asked, without the first, in many models a sink of attention."""
        places = torch.arange(self.tokens.shape[1])
        return (self.level < 0) & (places > 0) & (places < self.lengths[:, None])

    def digest(self) -> str:
        """SHA-256 of everything that numbers depend on."""
        found = hashlib.sha256(repr(self.difficulties).encode())
        for part in (self.tokens, self.labels, self.level, self.lengths):
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()


def without_task(score: str) -> ConfigError:
    """What is said of a score that asks for answers where there is no task."""
    return ConfigError(f"--scores {score}: asks for answers; give --task addition, hops, synthetic or a file")


def items_of(name: str, answered: Sequence[Answered], *, vocab_size: int) -> Items:
    """Prompts with answers as tensors.

    Args:
        name: of the task.
        answered: at least one.
        vocab_size: of the model.

    Raises:
        DataError: a token that the model has no row for.
    """
    length = max(len(each.ids) for each in answered) - 1
    difficulties = tuple(sorted({each.difficulty for each in answered}))
    tokens, labels = (torch.zeros(len(answered), length, dtype=torch.int64) for _ in range(2))
    level = torch.full_like(tokens, -1)
    for row, each in enumerate(answered):
        ids = torch.tensor(each.ids)
        if int(ids.max()) >= vocab_size:
            raise DataError(
                f"--task {name}: token id {int(ids.max())}, but the model's vocabulary has {vocab_size} entries; use "
                "this model's tokenizer"
            )
        count = len(ids) - 1
        tokens[row, :count], labels[row, :count] = ids[:-1], ids[1:]
        level[row, each.start - 1 : count] = difficulties.index(each.difficulty)
    lengths = torch.tensor([len(each.ids) - 1 for each in answered])
    return Items(name, tokens, labels, level, lengths, difficulties)
