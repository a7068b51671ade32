"""Which weights of a matrix stay: a share of the whole matrix or of every row, or n of every m neighbours of a row.

A share can also be of groups of g neighbours, which then stay or go as one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsecod_megatron.compression.parts import row_parts
from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """How many weights stay, and among which they compete.

    Attributes:
        sparsity: share of weights that go; the count is rounded to the nearest whole one.
        group: `matrix`, `row`, or `neighbours`: among which weights the lowest scores go.
        kept: of `neighbours`: how many stay
        of: of how many.
        width: consecutive weights of a row that stay or go together.
    """

    sparsity: float
    group: str
    kept: int = 0
    of: int = 0
    width: int = 1

    @property
    def period(self) -> int:
        """Columns that belong together: a matrix may be cut at its multiples."""
        return self.of or self.width

    def obstacle(self, columns: int) -> str:
        """Why matrices with so many columns cannot follow it, or nothing."""
        return f"columns must be a multiple of {self.period}" if columns % self.period else ""

    def with_share(self, sparsity: float) -> Pattern:
        """The same with another share of weights that go, which n:m does not have."""
        assert not self.of
        return replace(self, sparsity=sparsity)

    def keep(self, score: Tensor) -> Tensor:
        """The weights of highest score, or the groups of highest mean score.

        Args:
            score: `[..., rows, columns]`; leading axes are matrices of their own.

        Returns:
            bool of the same shape, True where a weight stays. Ties are broken so that counts are exact.
        """
        if self.width > 1:
            whole = replace(self, width=1).keep(score.unflatten(-1, (-1, self.width)).mean(-1))
            return whole.repeat_interleave(self.width, dim=-1)
        if self.group == "neighbours":
            groups, dropped = score.unflatten(-1, (-1, self.of)), self.of - self.kept
        else:
            groups = score.flatten(-2).unsqueeze(-2) if self.group == "matrix" else score
            dropped = int(self.sparsity * groups.shape[-1] + 0.5)
        kept = torch.ones_like(groups, dtype=torch.bool)
        for part in row_parts(groups):
            going = groups[part].topk(dropped, dim=-1, largest=False).indices
            kept[part].scatter_(-1, going, False)
        return kept.view(score.shape)


def parse_pattern(text: str, per: str | None) -> Pattern:
    """A pattern as a user writes it.

    Args:
        text: a share of weights to drop, such as `0.5`; `n:m`, where n of every m neighbours *stay*; or `group:g` or
            `group:g:share`, where a share (half by default) of the groups of g neighbours goes; it may be 0, for rules
            that round.
        per: `matrix` or `row`, what a share is of; None is `matrix`.

    Raises:
        ConfigError: none of these, groups of one, or `per` beside n:m.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(match[1]), int(match[2])
        if not 0 < kept < of:
            raise ConfigError(f"pattern {text}: n of every m weights stay, so give n from 1 to m - 1")
        if per is not None:
            raise ConfigError(f"per={per}: n:m is by neighbours already; leave it out")
        return Pattern(1 - kept / of, "neighbours", kept, of)
    match = re.fullmatch(r"group:(\d+)(?::(.+))?", text)
    share, width = (match[2] or "0.5", int(match[1])) if match else (text, 1)
    try:
        sparsity = float(share)
    except ValueError:
        sparsity = -1.0
    if match and width < 2:
        raise ConfigError(f"pattern {text}: a group has two weights or more; give a share alone, such as pattern=0.5")
    if not (0 < sparsity < 1 or (match and sparsity == 0)):
        raise ConfigError(f"pattern {text}: give the share of weights to drop, between 0 and 1, n:m, or group:g:share")
    return Pattern(sparsity, per or "matrix", width=width)
