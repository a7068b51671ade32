"""A HuggingFace teacher under every kind of split: losses, gradients and terms of one process; and zeros that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sparsecod_megatron.backend import select_backend
from tests.dist.distillation_worker import HEALED, HEALING_LAYOUTS, LAYOUTS, TEACHERS, case_config, train
from tests.helpers.cli import script_ranks
from tests.helpers.hf_models import write_llama

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teachers."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def zeros(folder: Path) -> int:
    """Number of zeros of a pruned model: every third weight of all layers' matrices."""
    for seed, (name, changes) in enumerate(TEACHERS.items()):
        write_llama(folder / name, seed=seed, **changes)
    write_llama(folder / HEALED, **TEACHERS["untied"])
    weights, count = load_file(folder / HEALED / "model.safetensors"), 0
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            weight.view(-1)[::3] = 0
            count += len(weight.view(-1)[::3])
    save_file(weights, folder / HEALED / "model.safetensors", metadata={"format": "pt"})
    return count


@pytest.fixture(scope="module")
def spread(folder: Path, zeros: int, repo_root: Path) -> dict[str, Any]:
    """All cases on two processes."""
    script_ranks(repo_root / "tests/dist/distillation_worker.py", folder / "runs.json", folder, nproc=2)
    return json.loads((folder / "runs.json").read_text())


def test_equals_one_process(folder: Path, spread: dict[str, Any]) -> None:
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    for teacher, layouts in LAYOUTS.items():
        config = case_config(teacher, folder)
        with running_processes(config, communication=backend.communication, device=backend.device) as groups:
            single = train(config, backend, groups)
        for layout in layouts:
            np.testing.assert_allclose(spread[f"{teacher}-{layout}"], single, rtol=2e-5, err_msg=f"{teacher}-{layout}")


@pytest.mark.parametrize("layout", HEALING_LAYOUTS)
def test_zeros_stay(layout: str, spread: dict[str, Any], zeros: int) -> None:
    """In parameters, fp32 weights and both moments, with weight decay, clipping and a teacher; the others train."""
    expected = {"zeros": zeros, "not zero any more": 0, "zero by training": 0, "reported": zeros}
    assert spread[f"{HEALED}-{layout}"] == expected
