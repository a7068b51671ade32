"""The roofline: its work against hand counts, its ranges on simpler hardware, and what slows a step down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.planning.hardware import GPUS, Efficiency, Range
from sparsecod_megatron.planning.layout import layout_of
from sparsecod_megatron.planning.step_time import StepTime, microbatch_work, step_time

DENSE, MOE = "examples/configs/dense_1B.yaml", "examples/configs/moe_1B_7B.yaml"
FULL = ("megatron.recompute_granularity=full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1")
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PERFECT = Efficiency(
    matmul=Range(1, 1),
    grouped_matmul=Range(1, 1),
    fp8=Range(1, 1),
    attention=Range(1, 1),
    memory=Range(1, 1),
    link=Range(1, 1),
)


def estimate(path: str, gpus: int, *overrides: str, gpu: str = "h100") -> StepTime:
    return step_time(layout_of(load_config(path, overrides), gpus), GPUS[gpu])


@pytest.mark.parametrize(
    ("path", "gpus", "overrides"),
    [
        (DENSE, 8, ()),
        (DENSE, 8, TP2),
        (DENSE, 8, ("parallel.pipeline_model_parallel_size=4",)),
        (DENSE, 8, ("parallel.context_parallel_size=2",)),
        (MOE, 16, ()),
        (MOE, 16, TP2),
        (MOE, 16, (*TP2, "parallel.expert_tensor_parallel_size=1")),
        (MOE, 16, ("parallel.pipeline_model_parallel_size=2",)),
    ],
)
def test_ranks_share_the_models_operations(path: str, gpus: int, overrides: tuple[str, ...]) -> None:
    """Over all ranks and micro-batches: the windowed convention times the step's tokens, whatever the layout."""
    config = load_config(path, overrides)
    layout = layout_of(config, gpus)
    total = 0.0
    for stage in range(layout.stages):
        work = microbatch_work(layout, stage)
        total += (work.dense + work.grouped + work.attention) * layout.num_microbatches * gpus / layout.stages
    length = config.data.seq_length
    tokens = config.train.global_batch_size * length
    assert total == pytest.approx(
        flops_per_token(ParameterTable.of(config), length, convention="windowed") * tokens, rel=1e-9
    )


def test_full_recompute_adds_a_forward_pass_of_the_layers() -> None:
    plain, again = (microbatch_work(layout_of(load_config(DENSE, keys), 8), 0) for keys in ((), FULL))
    output = 6 * 2048 * 50304 * 8 * 1024
    assert again.dense - output == pytest.approx((plain.dense - output) * 4 / 3)
    assert again.attention == pytest.approx(plain.attention * 4 / 3)


def test_hardware_without_other_limits_reaches_its_peak() -> None:
    """Infinite links and memory, perfect kernels: MFU is one but for the masked half of attention."""
    config = load_config(DENSE)
    unlimited = {"memory_bandwidth": 1e30, "nvlink_bandwidth": 1e30, "network_bandwidth": 1e30}
    time = step_time(layout_of(config, 8), replace(GPUS["h100"], **unlimited), PERFECT)
    length = config.data.seq_length
    expected = flops_per_token(ParameterTable.of(config), length) / flops_per_token(
        ParameterTable.of(config), length, convention="causal"
    )
    assert time.mfu.best == pytest.approx(expected)
    assert time.mfu.worst == pytest.approx(expected)


def test_ranges() -> None:
    """A 1B model on one node of H100 is known to train between 30 and 60 % MFU."""
    time = estimate(DENSE, 8)
    assert 0.3 < time.mfu.worst < time.mfu.best < 0.65
    assert time.seconds.best < time.seconds.worst
    assert sum(part.best for part in time.seconds_by_part.values()) == pytest.approx(time.seconds.best)
    assert time.tokens_per_s.best == pytest.approx(2**20 / time.seconds.best)


def test_bubble() -> None:
    """4 stages: 3 idle slots of 64 + 3, and half as much with two chunks."""
    pipeline = "parallel.pipeline_model_parallel_size=4"
    plain = estimate(DENSE, 8, pipeline)
    chunks = estimate(DENSE, 8, pipeline, "parallel.virtual_pipeline_model_parallel_size=2")
    assert plain.bubble == pytest.approx(3 / 67)
    assert chunks.bubble == pytest.approx(3 / 131)


def test_what_is_slower_and_faster() -> None:
    base = estimate(DENSE, 8).seconds
    assert estimate(DENSE, 8, *FULL).seconds.best > 1.2 * base.best
    assert estimate(DENSE, 8, *TP2).seconds.best > base.best
    assert estimate(DENSE, 8, "optimizer.optimizer=muon").seconds.worst > base.worst
    assert estimate(DENSE, 8, gpu="h200").seconds.best < base.best
    assert estimate(DENSE, 8, "precision.fp8_recipe=tensorwise").seconds.best < base.best
    assert estimate(DENSE, 16).seconds.best < 0.6 * base.best
