"""An audit finds every layout right as it is, and each planted fault in the row that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.audit.compare import FP32
from tests.dist.audit_worker import RUNS
from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist
FIRST = {
    "one rank fails: dp2 bf16": "could not run: RuntimeError at audit_worker.py",
    # A save looks at what it writes, so these end there.
    "padding counted: dp2 resume bf16": "not saved (the optimizer's fp32 weights of decoder.",
    "weights not gathered: dp2 resume bf16": "not saved (the optimizer's fp32 weights of output_layer.weight",
    "weaker balance: dp2": "step 1: gradient of decoder.layers.3.mlp.router.weight",
    "unmarked experts: tp2+sp": "step 1: grad_norm of layer 0",
    "validation counted: dp2 validation": "router.expert_bias after step 3",
}
"""The row that each fault turns red, and what it names."""


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, dict[str, Any]]:
    """All runs, in two processes that are started once."""
    folder = tmp_path_factory.mktemp("audit")
    script_ranks(repo_root / "tests/dist/audit_worker.py", folder, folder / "found.json", nproc=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("run", RUNS)
def test_what_is_right_is_green(run: str, audits: dict[str, dict[str, Any]]) -> None:
    right = {row: each["first"] for row, each in audits[run].items() if not row.startswith(tuple(RUNS[run].planted))}
    assert len(right) > len(RUNS[run].only)
    assert set(right.values()) == {None}


@pytest.mark.parametrize("row", FIRST)
def test_planted_fault_turns_its_row_red(row: str, audits: dict[str, dict[str, Any]]) -> None:
    (verdict,) = (rows[row] for rows in audits.values() if row in rows)
    assert verdict["red"]
    assert FIRST[row] in verdict["first"]


def test_gradient_norm_is_judged(audits: dict[str, dict[str, Any]]) -> None:
    """The norm of a layer is a statistic, and the whole one is what clips."""
    assert audits["experts"]["unmarked experts: tp2+sp"]["grad_norm"] > FP32.grad_norm


def test_a_tie_is_no_fault(audits: dict[str, dict[str, Any]]) -> None:
    """What differs with one seed alone is said, and is not red."""
    verdict = audits["tie"]["tie: 1 process recompute"]
    assert not verdict["red"]
    assert "step 1: loss" in verdict["once"]
