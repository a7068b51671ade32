"""A HuggingFace teacher under every kind of split: losses, gradients and terms of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from tests.dist.distillation_worker import LAYOUTS, TEACHERS, case_config, train
from tests.helpers.cli import script_ranks
from tests.helpers.hf_models import write_llama

pytestmark = pytest.mark.dist


def test_equals_one_process(tmp_path: Path, repo_root: Path) -> None:
    for seed, (name, changes) in enumerate(TEACHERS.items()):
        write_llama(tmp_path / name, seed=seed, **changes)
    script_ranks(repo_root / "tests/dist/distillation_worker.py", tmp_path / "runs.json", tmp_path, nproc=2)
    spread = json.loads((tmp_path / "runs.json").read_text())
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    for teacher, layouts in LAYOUTS.items():
        config = case_config(teacher, tmp_path)
        with running_processes(config, communication=backend.communication, device=backend.device) as groups:
            single = train(config, backend, groups)
        for layout in layouts:
            np.testing.assert_allclose(spread[f"{teacher}-{layout}"], single, rtol=2e-5, err_msg=f"{teacher}-{layout}")
