"""A branch is its parent resumed: bit for bit under its schedule and layout, closely in another, and with another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.analysis.report.payload import report_payload
from sparsecod_megatron.analysis.runs import load_runs
from tests.dist.conftest import SAVED, STEPS, Bench
from tests.dist.layouts import BUCKETS, TP2
from tests.dist.test_layouts import series
from tests.dist.test_resume import outcome
from tests.helpers.cli import read_jsonl, sparsecod

pytestmark = pytest.mark.dist
WSD = ("schedule.lr_decay_style=WSD", "schedule.lr_wsd_decay_steps=2", "schedule.lr_wsd_decay_style=linear")


@pytest.fixture(scope="module")
def parent(bench: Bench) -> Path:
    """Two processes with many buckets and overlap, dropout too, never stopped."""
    return bench.train("parent", *SETTINGS, nproc=2)


SETTINGS = (*WSD, *BUCKETS, "model.hidden_dropout=0.1")


def branch(parent: Path, bench: Bench, name: str, *overrides: str, nproc: int = 2) -> Path:
    return bench.train(name, f"checkpoint.branch_from={parent}@{SAVED}", *SETTINGS, *overrides, nproc=nproc)


def test_with_its_schedule_it_is_the_resumed_parent(parent: Path, bench: Bench) -> None:
    """Every byte of the last checkpoint's tensors, its state, and every number but the clock's."""
    found, expected = outcome(branch(parent, bench, "same")), outcome(parent)
    assert [record["step"] for record in found["metrics"]] == [*range(SAVED + 1, STEPS + 1)]
    assert found["metrics"] == expected["metrics"][SAVED:]
    assert found["statistics"] == b"".join(expected["statistics"].splitlines(keepends=True)[SAVED:])
    assert len(expected) > 4
    for name in expected.keys() - {"metrics", "statistics"}:
        assert found[name] == expected[name], name


@pytest.mark.parametrize(("overrides", "nproc"), [((), 1), ((TP2,), 2)], ids=["one", "tp2"])
def test_under_another_layout_it_is_close(overrides: tuple[str, ...], nproc: int, bench: Bench) -> None:
    """Without dropout, whose random states belong to a layout."""
    without = (*WSD, *BUCKETS)
    whole = bench.directory / "plain"
    if not whole.exists():
        bench.train(whole.name, *without, nproc=2)
    from_plain = f"checkpoint.branch_from={whole}@{SAVED}"
    run = bench.train(f"relaid-{nproc}", from_plain, *without, *overrides, nproc=nproc)
    np.testing.assert_allclose(series(run, "loss"), series(whole, "loss")[SAVED:], rtol=1e-5)


def test_another_schedule_continues_the_optimizer_and_is_written_down(parent: Path, bench: Bench) -> None:
    """Rates are the new schedule's, the first loss is the parent's, and a branch of a branch knows both."""
    decayed = branch(parent, bench, "decayed", "train.train_steps=6", "checkpoint.save_interval=1")
    rates, theirs = series(decayed, "lr"), series(parent, "lr")
    assert rates.tolist() == pytest.approx([2e-3 * 0.55, 2e-3 * 0.1])  # linear to a tenth in two steps
    assert theirs[SAVED] == pytest.approx(2e-3)
    assert series(decayed, "loss")[0] == series(parent, "loss")[SAVED]
    assert series(decayed, "loss")[1] != series(parent, "loss")[SAVED + 1]
    again = bench.train("again", f"checkpoint.branch_from={decayed}", *SETTINGS, nproc=2)
    lineage = json.loads((again / "lineage.json").read_text())["parents"]
    counted = [record["tokens"] for record in read_jsonl(parent / "metrics.jsonl")]
    assert lineage == [
        {"run": str(decayed), "step": 6, "tokens": counted[5]},
        {"run": str(parent), "step": SAVED, "tokens": counted[SAVED - 1]},
    ]
    bench.train("again", f"checkpoint.branch_from={parent}@{SAVED}", *SETTINGS, "train.train_steps=9", nproc=2)
    assert json.loads((again / "lineage.json").read_text())["parents"] == lineage, "a resumed branch is its own"
    assert [record["step"] for record in read_jsonl(again / "metrics.jsonl")] == [7, 8, 9]

    drawn = {run["name"]: run for run in report_payload(load_runs([parent, decayed, again]))["runs"]}
    assert dict(drawn["again"]["facts"])["Branched from"] == f"decayed @ 6 ← parent @ {SAVED}"
    assert dict(drawn["parent"]["facts"])["Branched from"] == "no run"
    assert drawn["decayed"]["metrics"]["loss"]["steps"] == [SAVED, SAVED + 1, SAVED + 2], "begins where it left"
    assert drawn["decayed"]["metrics"]["loss"]["values"][0] == drawn["parent"]["metrics"]["loss"]["values"][SAVED - 1]
    alone = report_payload(load_runs([decayed]))["runs"][0]
    assert alone["metrics"]["loss"]["steps"] == [SAVED + 1, SAVED + 2]


def test_refused_in_one_line(parent: Path, bench: Bench, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(parent / "checkpoints" / f"step_{SAVED:08d}", weights)
    state = json.loads((weights / "state.json").read_text())
    (weights / "state.json").write_text(json.dumps(state | {"scheduler": {}}))
    for overrides, said in (
        ((f"{parent}@5",), f"{parent} has no checkpoint of step 5 (it has {SAVED}, {STEPS}); give one of these"),
        ((f"{tmp_path}/absent@4",), "has no checkpoint of step 4 (it has none)"),
        ((str(tmp_path),), "no checkpoint here"),
        ((str(weights),), "holds weights without an optimizer"),
        ((f"{parent}@{SAVED}", "model.hidden_size=32"), "model.hidden_size"),
        ((f"{parent}@{SAVED}", "optimizer.optimizer=muon"), "optimizer.optimizer"),
        ((str(parent),), f"has done {STEPS} steps, and this run ends at {STEPS}"),
        ((f"{parent}@{SAVED}", f"checkpoint.init_from={parent}"), "remove one of them"),
    ):
        source, *more = overrides
        run = tmp_path / "refused"
        settings = (f"logging.run_dir={run}", f"checkpoint.branch_from={source}", *WSD, *more)
        result = sparsecod("train", bench.config, *settings, check=False)
        assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
        assert not run.exists()
