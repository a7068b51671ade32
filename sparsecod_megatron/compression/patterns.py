"""Which weights of a matrix stay: a share of the whole matrix or of every row, or n of every m neighbours of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """How many weights stay, and among which they compete.

    Attributes:
        sparsity: share of weights that go; the count is rounded to the nearest whole one.
        group: `matrix`, `row`, or `neighbours`.
        kept: of `neighbours`: how many stay
        of: of how many.
    """

    sparsity: float
    group: str
    kept: int = 0
    of: int = 0

    def obstacle(self, columns: int) -> str:
        """Why matrices with so many columns cannot follow it, or nothing."""
        return f"columns must be a multiple of {self.of}" if self.of and columns % self.of else ""

    def keep(self, score: Tensor) -> Tensor:
        """The weights of highest score.

        Args:
            score: `[..., rows, columns]`; leading axes are matrices of their own.

        Returns:
            bool of the same shape, True where a weight stays. Ties are broken so that counts are exact.
        """
        if self.group == "neighbours":
            groups, dropped = score.unflatten(-1, (-1, self.of)), self.of - self.kept
        else:
            groups = score.flatten(-2) if self.group == "matrix" else score
            dropped = int(self.sparsity * groups.shape[-1] + 0.5)
        going = groups.topk(dropped, dim=-1, largest=False).indices
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, going, False).view(score.shape)


def parse_pattern(text: str, per: str | None) -> Pattern:
    """A pattern as a user writes it.

    Args:
        text: a share of weights to drop, such as `0.5`; or `n:m`, where n of every m neighbours *stay*.
        per: `matrix` or `row`, what a share is of; None is `matrix`.

    Raises:
        ConfigError: neither, or `per` beside n:m.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(match[1]), int(match[2])
        if not 0 < kept < of:
            raise ConfigError(f"pattern {text}: n of every m weights stay, so give n from 1 to m - 1")
        if per is not None:
            raise ConfigError(f"per={per}: n:m is by neighbours already; leave it out")
        return Pattern(1 - kept / of, "neighbours", kept, of)
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = -1.0
    if not 0 < sparsity < 1:
        raise ConfigError(f"pattern {text}: give the share of weights to drop, between 0 and 1, or n:m")
    return Pattern(sparsity, per or "matrix")
