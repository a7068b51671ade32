"""The pattern index of heads whose pattern is planted, and its parts against independent ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from sparsecod_megatron.analysis.sparsity.pattern_index import GAMMA, INDEX, fewest, head_index, root_jsd
from tests.unit.analysis.sparsity.planted_rows import as_call, planted

TOKENS = 512


def index(arguments: dict[str, Tensor], head: int = 0) -> dict[str, float]:
    """Of one head, in parts of 100 queries."""
    call = as_call(arguments)
    parts = [slice(start, min(start + 100, TOKENS)) for start in range(0, TOKENS, 100)]
    return dict(zip(INDEX, head_index(call, parts)[head].tolist(), strict=True))


def lines(columns: tuple[int, ...] = (), distances: tuple[int, ...] = ()) -> Tensor:
    """One head that reads these columns and diagonals, and itself a little."""
    keys = torch.arange(TOKENS)
    distance = keys[:, None] - keys
    rows = torch.isin(keys, torch.tensor(columns)).expand(TOKENS, TOKENS) | torch.isin(
        distance, torch.tensor(distances)
    )
    return (rows.float() + 0.01 * (distance == 0))[None].tril()


def test_columns_and_diagonals_of_any_offset_are_found() -> None:
    """A diagonal at 64 or 192 lies in two diagonals of blocks; the published code keeps one of them, and 55 %."""
    causal = TOKENS * (TOKENS + 1) / 2
    stripes = index(planted(lines(columns=(3, 200))))
    assert not stripes["query_aware"] and stripes["recall"] > 0.98
    assert stripes["kept"] < 4 * TOKENS / causal
    for offset in (1, 64, 77, 192):
        found = index(planted(lines(distances=(offset,))))
        assert not found["query_aware"] and found["kept"] < 2 * TOKENS / causal, offset
        assert found["recall"] > 0.98 * (1 - offset / TOKENS)  # the first queries have no key there


def test_an_even_head_keeps_gamma_of_what_is_visible() -> None:
    found = index(planted(torch.ones(1, TOKENS, TOKENS).tril()))
    assert found["query_aware"] and found["sqrt_jsd"] < 0.02
    assert GAMMA < found["kept"] < 1 and found["kept"] == pytest.approx(found["recall"], abs=0.03)  # whole blocks


def test_a_head_of_random_blocks_is_query_aware() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.eye(TOKENS // 64)
    target = torch.tensor([int(torch.randint(block + 1, (1,), generator=generator)) for block in range(len(blocks))])
    target[-2:] = 1  # the probe spans both
    place = torch.arange(TOKENS) // 64
    query, key = 80 * blocks[target[place]], blocks[place]
    found = index({"query": query[None, None], "key": key[None, None], "value": key[None, None]})
    assert found["query_aware"] and found["recall"] > GAMMA and found["kept"] < 0.35


def test_divergence_and_smallest_sets_against_others() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.dirichlet(np.ones(9), size=4) for _ in range(2))
    first[0, 3] = 0
    found = root_jsd(torch.tensor(first / first.sum(1, keepdims=True)), torch.tensor(second))
    np.testing.assert_allclose(found, [jensenshannon(*pair) for pair in zip(first, second, strict=True)], rtol=1e-9)
    for row, kept in zip(second, fewest(torch.tensor(second)), strict=True):
        ranked, total, chosen = np.argsort(-row), 0.0, set()
        for place in ranked:
            if total >= GAMMA:
                break
            total += row[place]
            chosen.add(int(place))
        assert chosen == set(kept.nonzero().flatten().tolist())
