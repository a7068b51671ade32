from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from sparsecod_megatron.data.batches import BatchIterator
from sparsecod_megatron.errors import ConfigError


class Numbered(Dataset):
    """Sample `n` is filled with `n`, and carries a key that batches must drop, as blended samples do."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        whole = torch.full((4,), index, dtype=torch.int64)
        return {"tokens": whole, "labels": whole, "position_ids": whole, "loss_mask": whole.float(), "dataset_id": 0}


def micro_steps(length, *, size_at, parallel, micro=1, consumed=0, workers=0):
    """Sample numbers as `[micro-steps][ranks][micro-batch]`, the global batch being `size_at(samples consumed)`."""
    ranks = [
        [
            batch["tokens"][:, 0].tolist()
            for batch in BatchIterator(
                Numbered(length),
                micro_batch_size=micro,
                global_batch_size=size_at,
                data_parallel_rank=rank,
                data_parallel_size=parallel,
                consumed_samples=consumed,
                num_workers=workers,
            )
        ]
        for rank in range(parallel)
    ]
    return list(zip(*ranks, strict=True))


def global_batches(length, *, size, parallel, micro=1, consumed=0, workers=0):
    """Sample numbers of each global batch of one `size` as `[micro-steps][ranks][micro-batch]`."""
    steps = micro_steps(
        length, size_at=lambda _: size, parallel=parallel, micro=micro, consumed=consumed, workers=workers
    )
    per_batch = size // (micro * parallel)
    return [steps[start : start + per_batch] for start in range(0, len(steps), per_batch)]


def flat(batch):
    return [number for step in batch for rank in step for number in rank]


@given(
    parallel=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 3),
    steps=st.integers(1, 3),
    batches=st.integers(1, 3),
    consumed=st.integers(0, 30),
    rest=st.integers(0, 5),
)
def test_global_batch_k_is_its_samples_in_order(parallel, micro, steps, batches, consumed, rest):
    size = parallel * micro * steps
    length = consumed + batches * size + min(rest, size - 1)
    got = global_batches(length, size=size, parallel=parallel, micro=micro, consumed=consumed)
    expected = [list(range(consumed + k * size, consumed + (k + 1) * size)) for k in range(batches)]
    assert [flat(batch) for batch in got] == expected


def test_global_batches_do_not_depend_on_the_layout():
    layouts = [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)]
    batches = [[flat(b) for b in global_batches(40, size=8, parallel=p, micro=m)] for p, m in layouts]
    assert all(layout == batches[0] for layout in batches)
    assert len(batches[0]) == 5


def test_resuming_under_another_layout_goes_on_where_the_first_run_stopped():
    whole = [flat(batch) for batch in global_batches(48, size=8, parallel=4, micro=2)]
    for parallel in (1, 2, 4):
        rest = global_batches(48, size=8, parallel=parallel, micro=1, consumed=16)
        assert [flat(batch) for batch in rest] == whole[2:]


@given(
    parallel=st.sampled_from([1, 2]),
    micro=st.integers(1, 2),
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    stop=st.integers(0, 5),
)
def test_a_batch_of_changing_size_is_still_its_samples_in_order(parallel, micro, factors, stop):
    """Sizes by consumed samples, from the start and from any later batch on."""
    sizes = [factor * parallel * micro for factor in factors]
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    size_at = {**dict(zip(begins, sizes, strict=True)), sum(sizes): parallel * micro}.__getitem__
    first = min(stop, len(sizes) - 1)
    steps = micro_steps(sum(sizes), size_at=size_at, parallel=parallel, micro=micro, consumed=begins[first])
    for begin, size in list(zip(begins, sizes, strict=True))[first:]:
        batch, steps = steps[: size // (parallel * micro)], steps[size // (parallel * micro) :]
        assert flat(batch) == list(range(begin, begin + size))
    assert not steps


def test_batches_hold_four_tensors_of_the_right_kind():
    iterator = BatchIterator(
        Numbered(4), micro_batch_size=2, global_batch_size=lambda _: 2, data_parallel_rank=0, data_parallel_size=1
    )
    kinds = {key: (value.dtype, tuple(value.shape)) for key, value in next(iterator).items()}
    integers = (torch.int64, (2, 4))
    floats = (torch.float32, (2, 4))
    assert kinds == {"tokens": integers, "labels": integers, "position_ids": integers, "loss_mask": floats}


def test_worker_processes_give_the_same_batches():
    assert global_batches(24, size=4, parallel=2, workers=2) == global_batches(24, size=4, parallel=2)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    global_batches(8, size=4, parallel=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_global_batch_that_is_no_whole_number_of_steps_is_refused():
    with pytest.raises(ConfigError, match=r"train.global_batch_size 6: not a multiple .* make it a multiple of 4"):
        global_batches(24, size=6, parallel=2, micro=2)


def test_a_dataset_that_is_used_up_is_our_own_mistake():
    with pytest.raises(AssertionError, match="is built for the samples consumed"):
        global_batches(24, size=4, parallel=1, consumed=21)
