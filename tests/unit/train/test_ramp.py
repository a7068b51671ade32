"""The ramp of the global batch against Megatron-Core's own calculator, and against a walk through the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import TrainConfig, batch_sizes, data_parallel_size, load_config
from sparsecod_megatron.errors import ConfigError

select_backend()

from megatron.core.num_microbatches_calculator import (  # noqa: E402
    RampupBatchsizeNumMicroBatchesCalculator,
)

from sparsecod_megatron.train.ramp import global_batch_size, samples_of_steps  # noqa: E402


@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    increments=st.integers(1, 6),
    samples=st.integers(1, 500),
    consumed=st.integers(0, 700),
)
def test_equals_megatron(start: int, increment: int, increments: int, samples: int, consumed: int) -> None:
    last = start + increment * increments
    train = TrainConfig(global_batch_size=last, rampup_batch_size=[start, increment, samples])
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=last,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=0,
        start_global_batch_size=start,
        batch_size_increment=increment,
        ramup_samples=samples,
    )
    calculator.update(consumed, consistency_check=False)
    assert global_batch_size(train, consumed) == calculator.current_global_batch_size


def test_a_ramp_written_down() -> None:
    """[4, 4, 24] to 12: two sizes below, twelve samples each, a step taking the size of its first sample."""
    train = TrainConfig(global_batch_size=12, rampup_batch_size=[4, 4, 24])
    assert batch_sizes(train) == [4, 8, 12]
    consumed, sizes = 0, []
    for _ in range(8):
        sizes.append(global_batch_size(train, consumed))
        consumed += sizes[-1]
    assert sizes == [4, 4, 4, 8, 8, 12, 12, 12]
    assert [samples_of_steps(train, steps) for steps in range(9)] == [0, 4, 8, 12, 20, 28, 40, 52, 64]
    # Behind samples that were consumed in batches of another size.
    assert [samples_of_steps(train, steps, 21) for steps in range(4)] == [0, 8, 20, 32]


def test_without_a_ramp_the_batch_is_constant() -> None:
    train = TrainConfig(global_batch_size=8)
    assert batch_sizes(train) == [8]
    assert global_batch_size(train, 0) == global_batch_size(train, 10**9) == 8
    assert samples_of_steps(train, 10**9) == 8 * 10**9


def test_a_ramp_that_starts_at_the_end_is_none() -> None:
    train = TrainConfig(global_batch_size=8, rampup_batch_size=[8, 2, 100])
    assert [global_batch_size(train, consumed) for consumed in (0, 50, 200)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("ramp", "part"),
    [
        ("[4, 4]", "not three positive numbers"),
        ("[4, 0, 10]", "not three positive numbers"),
        ("[16, 4, 10]", "starts at 16, above train.global_batch_size=12"),
        ("[4, 3, 10]", "steps of 3 from 4 do not reach train.global_batch_size=12"),
    ],
)
def test_refused(ramp: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        load_config(None, ["train.global_batch_size=12", f"train.rampup_batch_size={ramp}"])
    assert str(caught.value).startswith("train.rampup_batch_size: ")


@pytest.mark.parametrize(
    ("overrides", "world", "part"),
    [
        (["train.micro_batch_size=2"], 2, "its size 6 is not a multiple of .* = 2 × 2"),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
            4,
            "its size 6 gives 3 micro-batches a step",
        ),
    ],
)
def test_every_size_must_be_shared_evenly(overrides: list[str], world: int, part: str) -> None:
    config = load_config(None, ["train.global_batch_size=8", "train.rampup_batch_size=[4, 2, 10]", *overrides])
    with pytest.raises(ConfigError, match=f"train.rampup_batch_size: {part}"):
        data_parallel_size(config, world)
    config.train.rampup_batch_size = [4, 4, 10]
    assert data_parallel_size(config, world) == 2
