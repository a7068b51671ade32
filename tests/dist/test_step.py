"""A step is the same step however it is cut: balance over its whole batch, and a norm that counts every shard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.dist.step_worker import LAYOUTS, LEFT_UNMARKED, RUN, series
from tests.helpers.cli import script_ranks
from tests.helpers.training import fresh_router_losses

pytestmark = pytest.mark.dist


def single_process(*overrides: str) -> list[list[float]]:
    """[loss, gradient norm] by step of one process."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    config = load_config(None, [*RUN, *overrides])
    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        return series(backend, groups, overrides)


@pytest.fixture(scope="module")
def whole() -> list[list[float]]:
    """The reference: one process and one micro-batch, where the step's load is what the router sees."""
    return single_process("train.micro_batch_size=8")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, list[list[float]]]:
    output = tmp_path_factory.mktemp("step") / "collected.json"
    script_ranks(repo_root / "tests/dist/step_worker.py", output, nproc=4)
    return json.loads(output.read_text())


def assert_same(ours: list[list[float]], theirs: list[list[float]]) -> None:
    """Losses to 1e-5; norms, which magnify the rounding by which the weights differ, to 1e-4."""
    np.testing.assert_allclose(np.array(ours)[:, 0], np.array(theirs)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(np.array(ours)[:, 1], np.array(theirs)[:, 1], rtol=1e-4)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_balance_does_not_depend_on_the_micro_batch(size: int, whole: list[list[float]]) -> None:
    assert_same(single_process(f"train.micro_batch_size={size}"), whole)


@pytest.mark.parametrize("name", [*LAYOUTS, *(f"{name}-unmarked" for name in LEFT_UNMARKED)])
def test_balance_and_norm_do_not_depend_on_the_layout(
    name: str, collected: dict[str, list[list[float]]], whole: list[list[float]]
) -> None:
    assert_same(collected[name], whole)


def test_the_balance_matters(whole: list[list[float]]) -> None:
    """The comparison is of runs that the loss moves."""
    without = single_process("train.micro_batch_size=8", "model.moe_aux_loss_coeff=0")
    assert np.abs(np.array(whole) - np.array(without))[-1].min() > 1e-2
