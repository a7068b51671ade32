"""Parameter norms and router statistics of every layout are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from tests.dist.layouts import Layout
from tests.dist.norms_router_worker import ALL_LAYOUTS, MODELS, STEPS, layout_config, statistics
from tests.helpers.cli import script_ranks
from tests.helpers.training import ROUTER_FIELDS, fresh_router_losses

pytestmark = pytest.mark.dist

NORMS = {"grad_norm", "param_norm", "update_ratio"}


def single_process(model: str, checkpoint: Path) -> list[list[dict[str, Any]]]:
    """Two steps from fresh weights, saved; then the statistics of the steps that follow, with a fresh optimizer."""
    backend = select_backend()
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes

    config = layout_config(Layout("single", model, 1, ()))
    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        trainer, _ = statistics(config, backend, groups, None)
        save_checkpoint(checkpoint, trainer, state=TrainState())
        return statistics(config, backend, groups, resolve_step_dir(checkpoint))[1]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Statistics by layout, or by model for one process."""
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir

    folder = tmp_path_factory.mktemp("norms-router")
    single = {model: single_process(model, folder / model) for model in MODELS}
    sources = (f"{model}={resolve_step_dir(folder / model)}" for model in MODELS)
    script_ranks(repo_root / "tests/dist/norms_router_worker.py", *sources, folder / "collected.json", nproc=4)
    return single | json.loads((folder / "collected.json").read_text())


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(layout: Layout, collected: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Two fp32 steps on four processes, all values of all layers to 1e-5 relative; expert loads exactly."""
    ours, theirs = collected[layout.name], collected[layout.model]
    assert len(ours) == len(theirs) == STEPS
    for step, (our_layers, their_layers) in enumerate(zip(ours, theirs, strict=True)):
        for index, (layer, expected) in enumerate(zip(our_layers, their_layers, strict=True)):
            assert set(layer) == set(expected) == (NORMS | ROUTER_FIELDS if layout.model == "moe" else NORMS)
            for name, value in expected.items():
                rtol = 0.0 if name == "tokens_per_expert" else 1e-5
                where = f"step {step}, layer {index}, {name}"
                np.testing.assert_allclose(layer[name], value, rtol=rtol, err_msg=where)


def test_the_reference_is_worth_comparing_with(collected: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Layers differ, experts are unevenly loaded, and the second step moves other weights than the first."""
    for model in MODELS:
        for name in NORMS:
            values = np.array([[layer[name] for layer in layers] for layers in collected[model]])
            assert len(np.unique(values)) == values.size
    assert all(layer["load_max_over_mean"] > 1.1 for layers in collected["moe"] for layer in layers)
