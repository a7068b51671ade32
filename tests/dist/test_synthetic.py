"""A synthetic task under every kind of layout: the losses, gradients and right answers of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.dist.synthetic_worker import LAYOUTS, RUN, STEPS, measured
from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """One process with one micro-batch: the mean over the answers of the batch, by definition."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    whole = ("train.micro_batch_size=8",)
    config = load_config(None, [*RUN, *whole])
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        return measured(backend, groups, whole)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("synthetic") / "collected.json"
    script_ranks(repo_root / "tests/dist/synthetic_worker.py", output, nproc=2)
    return json.loads(output.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, spread: dict[str, dict[str, Any]], single: dict[str, Any]) -> None:
    ours = spread[layout]
    assert ours["tokens"] == single["tokens"] == [8 * 16] * STEPS
    assert ours["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    assert ours["validation_loss"] == pytest.approx(single["validation_loss"], rel=1e-5)
    assert ours["answer_accuracy"] == pytest.approx(single["answer_accuracy"], abs=1e-9)
    assert ours["by_evaluate"] == pytest.approx(ours["validation_loss"], rel=1e-6)
