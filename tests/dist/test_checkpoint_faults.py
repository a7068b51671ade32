"""A damaged or vanished checkpoint costs the steps since the one before, never the run; through the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import MODELS, SAVED, STEPS, Bench
from tests.dist.layouts import SP, TP2
from tests.dist.test_layouts import series
from tests.dist.test_resume import stopped_copy
from tests.helpers.cli import sparsecod_ranks

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
    last, first = (f"step_{step:08d}" for step in (STEPS, SAVED))
    damage(checkpoints / last)
    (checkpoints / f"{last}.tmp-0badcafe").mkdir()
    command = ("train", bench.config, f"logging.run_dir={run}")
    result = sparsecod_ranks(*command, "checkpoint.keep_last=1", nproc=2)
    assert f"{last}: damaged (" in result.stderr and f"using {first} instead" in result.stderr
    np.testing.assert_allclose(series(run, "loss"), series(reference["dense"], "loss"), rtol=1e-4)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", last]

    damage(checkpoints / last)
    before = snapshot(run)
    result = sparsecod_ranks(*command, "train.train_steps=30", nproc=2, check=False)
    assert result.returncode == 2 and "none of 1 checkpoints can be used" in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(run) == before


def test_layers_of_several_kinds_resume_under_another_layout(bench: Bench) -> None:
    """Other norms, and no experts in one layer: saved by one process, continued by one (bitwise) and by two."""
    variant = (*MODELS["moe"], "model.moe_first_k_dense_layers=1", "model.norm_placement=mix")
    straight = bench.train("kinds", *variant)
    for nproc, layout in ((1, ()), (2, (TP2, SP))):
        run = stopped_copy(straight, bench.directory / f"kinds-{nproc}")
        bench.train(run.name, *variant, *layout, nproc=nproc)
        ours, theirs = series(run, "loss"), series(straight, "loss")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if nproc > 1 else 0)
