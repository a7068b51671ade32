"""Every variant of the model family under sequence parallelism, and under each other layout that concerns it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from tests.dist.variants_worker import ALIKE, CASES, CONCERNED, Case, train
from tests.helpers.cli import script_ranks
from tests.helpers.variants import DENSE, MOE

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Any]:
    """All cases on two processes."""
    output = tmp_path_factory.mktemp("variants") / "runs.json"
    script_ranks(repo_root / "tests/dist/variants_worker.py", output, nproc=2)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def single() -> dict[tuple[str, str], Any]:
    """Each variant in this process."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    cases = [Case(model, variant) for model, variant in dict.fromkeys((case.model, case.subject) for case in CASES)]
    config = cases[0].config()
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        return {(case.model, case.subject): train(case.config(), backend, groups) for case in cases}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(case: Case, spread: dict[str, Any], single: dict[tuple[str, str], Any]) -> None:
    """Fresh weights, losses, gradient norms and statistics, to 1e-5; the second step has seen the gradients."""
    ours, theirs = spread[case.name], single[case.model, case.subject]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    for layers, expected in zip(ours["layers"], theirs["layers"], strict=True):
        for layer, want in zip(layers, expected, strict=True):
            assert set(layer) == set(want)
            for name, value in want.items():
                np.testing.assert_allclose(layer[name], value, rtol=2e-5, err_msg=name)


def test_no_variant_is_left_out_by_a_misspelt_name() -> None:
    assert ALIKE.union(*CONCERNED.values()) <= DENSE.keys() | MOE.keys()
    assert {(case.model, case.subject) for case in CASES} >= {("dense", name) for name in DENSE if name not in ALIKE}
