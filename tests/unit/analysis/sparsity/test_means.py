"""Which mean a table of matrices has: of weights, or of matrices."""

from __future__ import annotations

import pytest

from sparsecod_megatron.analysis.sparsity.means import mean_row

ROWS = [
    {"layer": 0, "kind": "qkv", "name": "a", "elements": 30, "gini": 0.4, "stable_rank": 10.0, "unchanged": None},
    {"layer": 0, "kind": "qkv", "name": "b", "elements": 10, "gini": 0.8, "stable_rank": 2.0, "unchanged": 0.5},
    {"layer": 1, "kind": "norm", "name": "c", "elements": 10, "gini": 0.4, "stable_rank": None, "unchanged": 0.1},
]


def test_a_weight_counts_once_a_rank_by_matrix_and_what_is_missing_not_at_all() -> None:
    means = mean_row(ROWS)
    assert means == {
        "elements": 50,
        "gini": pytest.approx((30 * 0.4 + 10 * 0.8 + 10 * 0.4) / 50),
        "stable_rank": 6.0,
        "unchanged": pytest.approx(0.3),
    }
    assert mean_row(ROWS[:1])["unchanged"] is None
