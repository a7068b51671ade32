"""Exact choices: against a sort, where scores tie, and between processes (tests/dist/test_mechanisms.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.mechanisms.weights.engine.patterns import smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.selection import hashed, largest, magnitude_keys, random_keys
from tests.helpers.cli import free_port


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A group of one."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 300), decimals=st.sampled_from([0, 1, 7]), data=st.data())
def test_largest_is_a_sort(seed: int, size: int, decimals: int, data: st.DataObject) -> None:
    """Exact counts in each of three rows, whose slices lie in different parts; rounded values tie, many at zero."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator).round(decimals=decimals) for _ in range(5)]
    rows = [0, 1, 0, 2, 1]
    allowed = [torch.rand(size, generator=generator) < 0.7 for _ in parts]
    of_row = [[index for index, row in enumerate(rows) if row == wanted] for wanted in range(3)]
    available = [sum(int(allowed[index].sum()) for index in indices) for indices in of_row]
    counts = [data.draw(st.integers(0, number)) for number in available]
    keys = [magnitude_keys(part, mask) for part, mask in zip(parts, allowed, strict=True)]
    chosen = largest(keys, rows, torch.tensor(counts), lambda index: torch.arange(size) + index * size)
    for indices, count in zip(of_row, counts, strict=True):
        assert sum(int(chosen[index].sum()) for index in indices) == count
        values = torch.cat([parts[index].abs()[allowed[index]] for index in indices])
        taken = torch.cat([parts[index].abs()[chosen[index]] for index in indices])
        assert torch.equal(taken.sort(descending=True).values, values.sort(descending=True).values[:count])
    assert all(bool((~mask | may).all()) for mask, may in zip(chosen, allowed, strict=True))


def test_ties_are_broken_by_place_and_not_by_part() -> None:
    """The same weights, cut elsewhere."""
    zeros = torch.zeros(1000)

    def choice(cut: int) -> torch.Tensor:
        parts = [zeros[:cut], zeros[cut:]]
        keys, starts = [magnitude_keys(part) for part in parts], [0, cut]
        places = [torch.arange(len(part)) + start for part, start in zip(parts, starts, strict=True)]
        return torch.cat(largest(keys, [0, 0], torch.tensor([100]), lambda index: places[index]))

    assert int(choice(10).sum()) == 100 and torch.equal(choice(10), choice(700))
    assert not bool(choice(10)[:100].all())


def test_hashes_are_in_no_order() -> None:
    values = hashed(torch.arange(4096))
    assert len(values.unique()) == 4096 and bool((values >= 0).all())
    below = (values < 2**62).float()
    assert below.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (below[1:] == below[:-1]).float().mean().item() == pytest.approx(0.5, abs=0.03)
    keys = random_keys(torch.arange(4096), seed=3)
    assert bool((keys >= 0).all()) and not torch.equal(keys.argsort(), random_keys(torch.arange(4096), 4).argsort())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (1, 16)]))
def test_smallest_of_each_is_a_stable_sort(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight = torch.randn(6, 4 * m, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    dead = smallest_of_each(weight, n, m)
    for row, marks in zip(weight.tolist(), dead.tolist(), strict=True):
        for start in range(0, 4 * m, m):
            order = sorted(range(m), key=lambda index: (-abs(row[start + index]), index))
            assert [marks[start + index] for index in order] == [False] * n + [True] * (m - n)
