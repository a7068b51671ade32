"""Several datasets drawn from in fixed proportions, by a table that repeats.

Megatron's BlendedDataset stores the choice for every sample of the run. The same greedy rule (always the source that is
furthest behind its share) applied to one period of 2^20 samples, over and over, needs no file, and the choice for a
sample does not depend on the length of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.datasets import helpers
from torch.utils.data import Dataset

from sparsecod_megatron.errors import DataError

PERIOD = 1 << 20


class BlendTable:
    """Which source a sample comes from, and which of the source's samples it is.

    Args:
        weights: share of each source, in any unit.

    Raises:
        DataError: a share of less than one sample a period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        if (least := float(shares.min())) < 1 / PERIOD:
            message = f"less than one sample in {PERIOD}; raise it or leave the source out"
            raise DataError(f"blend: a share of {least:.3g} is {message}")
        self._source, self._number = np.zeros(PERIOD, dtype=np.int16), np.zeros(PERIOD, dtype=np.int64)
        helpers.build_blending_indices(self._source, self._number, shares, len(shares), PERIOD, False)
        self._per_period = np.bincount(self._source, minlength=len(shares))

    def locate(self, index: int) -> tuple[int, int]:
        """Source, and place in it, of one sample."""
        period, place = divmod(index, PERIOD)
        source = int(self._source[place])
        return source, period * int(self._per_period[source]) + int(self._number[place])

    def counts(self, num_samples: int) -> list[int]:
        """Samples that the first `num_samples` take from each source."""
        periods, rest = divmod(num_samples, PERIOD)
        counts = periods * self._per_period + np.bincount(self._source[:rest], minlength=len(self._per_period))
        return [int(count) for count in counts]


class BlendDataset(Dataset[dict[str, torch.Tensor]]):
    """`num_samples` samples of several datasets.

    Args:
        sources: each with at least as many samples as `table.counts(num_samples)` says.
        table: a table of as many sources.
        num_samples: length.
    """

    def __init__(
        self, sources: Sequence[Dataset[dict[str, torch.Tensor]]], table: BlendTable, num_samples: int
    ) -> None:
        self._sources, self._table, self._num_samples = sources, table, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, number = self._table.locate(index)
        return self._sources[source][number]
