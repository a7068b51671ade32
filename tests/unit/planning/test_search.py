"""The search: what it finds can run and fits, and what cannot be found is said in one line."""

from __future__ import annotations

import time

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.planning import GPUS, make_plan, require_fit, search_layouts

DENSE, MOE = "examples/configs/dense_1B.yaml", "examples/configs/moe_1B_7B.yaml"
LARGE = ("model.num_layers=32", "model.hidden_size=8192", "model.num_attention_heads=64", "model.ffn_hidden_size=28672")


@pytest.mark.parametrize(("path", "gpus"), [(DENSE, 8), (MOE, 16)])
def test_pasted_overrides_give_the_layout_that_was_found(path: str, gpus: int) -> None:
    """Ten of them, from the fastest to the slowest."""
    found = search_layouts(load_config(path), gpus, GPUS["h100"])
    expected = [candidate.expected_seconds for candidate in found]
    assert expected == sorted(expected)
    assert len({tuple(candidate.overrides) for candidate in found}) == len(found)
    for candidate in found[:: max(1, len(found) // 10)]:
        plan = make_plan(load_config(path, candidate.overrides), gpus, GPUS["h100"])
        require_fit(plan)
        assert plan.fullest.total == candidate.memory <= 0.9 * 80e9
        assert plan.time == candidate.time


def test_layout_and_recompute_of_the_file_are_among_the_choices() -> None:
    files = (
        "parallel.tensor_model_parallel_size=4",
        "parallel.sequence_parallel=true",
        "megatron.recompute_granularity=selective",
        "megatron.recompute_modules=[mlp]",
    )
    found = search_layouts(load_config(DENSE, files), 8, GPUS["h100"])
    assert [] in [candidate.overrides for candidate in found]
    best = found[0].overrides
    assert "parallel.tensor_model_parallel_size=1" in best
    assert "megatron.recompute_granularity=null" in best


def test_a_model_too_large_for_one_gpu_is_split() -> None:
    found = search_layouts(load_config(DENSE, LARGE), 32, GPUS["h100"])
    assert found
    for candidate in found:
        assert any("tensor_model_parallel" in key or "pipeline" in key for key in candidate.overrides)


@pytest.mark.slow
def test_128_gpus_take_seconds() -> None:
    started = time.process_time()
    found = search_layouts(load_config(MOE), 128, GPUS["h200"])
    assert len(found) > 100
    assert time.process_time() - started < 30


def test_nothing_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"--gpus 1: no layout fits a H100 SXM .*; the smallest needs .* GiB"
    ) as caught:
        search_layouts(load_config(DENSE, LARGE), 1, GPUS["h100"])
    assert "\n" not in str(caught.value)


def test_nothing_can_run() -> None:
    with pytest.raises(ConfigError, match="--gpus 7: no layout can run; .*global_batch_size: 1024 is not a multiple"):
        search_layouts(load_config(DENSE), 7, GPUS["h100"])
