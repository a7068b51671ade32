"""A damaged or vanished checkpoint costs the steps since the one before, never the run; through the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Bench
from tests.dist.layouts import SP, TP2
from tests.dist.test_layouts import series
from tests.helpers.cli import sparsecod

pytestmark = pytest.mark.dist


def snapshot(run: Path) -> dict[str, bytes]:
    """Every file of a run, by its path."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def damage(step: Path) -> None:
    """Flip one bit in the middle of a shard."""
    shard = sorted(step.glob("*.distcp"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def test_goes_on_from_the_one_before_and_in_the_end_refuses(bench: Bench, reference: dict[str, Path]) -> None:
    """Two ranks agree on it; what the damaged step left is cleaned up; with none left nothing is touched."""
    run = bench.directory / "damaged"
    shutil.copytree(reference["dense"], run)
    checkpoints = run / "checkpoints"
    damage(checkpoints / "step_00000012")
    (checkpoints / "step_00000012.tmp-0badcafe").mkdir()
    command = ("train", "--nproc", "2", bench.config, f"logging.run_dir={run}")
    result = sparsecod(*command, "checkpoint.keep_last=1")
    assert "step_00000012: damaged (" in result.stderr and "using step_00000006 instead" in result.stderr
    np.testing.assert_allclose(series(run, "loss"), series(reference["dense"], "loss"), rtol=1e-4)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000012"]

    damage(checkpoints / "step_00000012")
    before = snapshot(run)
    result = sparsecod(*command, "train.train_steps=30", check=False)
    assert result.returncode == 2 and "none of 1 checkpoints can be used" in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(("model.norm_placement=mix",), id="mix"),
        pytest.param(
            ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.moe_first_k_dense_layers=1"),
            id="first-dense",
        ),
    ],
)
def test_layers_of_several_kinds_resume_under_another_layout(variant: tuple[str, ...], bench: Bench) -> None:
    """Saved by one process, gone on with by one (bitwise) and by two (to 1e-5)."""
    name = variant[-1].replace("=", "-")
    straight = bench.train(name, *variant)
    for nproc, layout in ((1, ()), (2, (TP2, SP))):
        run = bench.directory / f"{name}-{nproc}"
        shutil.copytree(straight, run)
        (run / "checkpoints" / "latest").write_text("step_00000006\n")
        bench.train(run.name, *variant, *layout, nproc=nproc)
        ours, theirs = series(run, "loss"), series(straight, "loss")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if nproc > 1 else 0)
