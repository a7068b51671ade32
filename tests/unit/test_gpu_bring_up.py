"""The frame of the bring-up: hangs and crashes are lines of the table, and docs/GPU.md says which step fills what."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.unit.test_docs import table
from tools.gpu_bring_up.bench import FAIL, PASS, SKIP, Bench, Check, Skipped
from tools.gpu_bring_up.pack import Contents, pack
from tools.gpu_bring_up.process import ROOT, forked, fresh
from tools.gpu_bring_up.results import BEGIN, END, closing_table, publish, write_results
from tools.gpu_bring_up.run import _run_step
from tools.gpu_bring_up.steps import LIMIT_S, STEPS, Step

NAMES = {step.name for step in STEPS}
HANGS = "import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', 'while True: pass'])"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tmp_path, tmp_path, step="some", cuda=True)


# ---------------------------------------------------------------- the page


def test_what_no_card_has_run_names_the_step_that_will() -> None:
    rows = [row for row in table("GPU.md", "What was run") if "not yet run" in " ".join(row)]
    assert rows
    for row in rows:
        named = set(re.findall(r"step `(\w+)`", row[2]))
        assert named and named <= NAMES, row


def test_every_step_is_on_the_page() -> None:
    assert [row[0].strip("`") for row in table("GPU.md", "Bring-up on one card")] == [step.name for step in STEPS]


def test_steps_fit_into_the_time() -> None:
    assert sum(step.seconds for step in STEPS) <= LIMIT_S == 9 * 60


def test_a_cards_table_is_put_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "GPU.md"
    page.write_text(f"before\n{BEGIN}\nnothing yet\n{END}\nafter\n")
    card = Check("environment", "card", PASS, "", values={"card": "H200", "memory_gib": 139.8, "driver": "580"})
    write_results(tmp_path, [card, Check("kernels", "Linear", FAIL, "error 1e-1 | at most 1e-2")], seconds=12.0)
    publish(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "nothing yet" not in text
    assert "H200, 139.8 GiB, driver 580" in text
    assert "| kernels | Linear | FAIL | error 1e-1 ∣ at most 1e-2 |" in text
    publish(tmp_path, page)
    assert page.read_text() == text


def test_a_rehearsal_is_not_published(tmp_path: Path) -> None:
    write_results(tmp_path, [Check("environment", "card", SKIP, "no CUDA device")], seconds=1.0)
    with pytest.raises(SystemExit, match="without a card"):
        publish(tmp_path)
    assert (ROOT / "docs/GPU.md").read_text().count(BEGIN) == 1


# ---------------------------------------------------------------- checks


def test_states(bench: Bench) -> None:
    with bench.check("passes") as found:
        found.figure = "1.00"
    with bench.check("fails"):
        raise ValueError("two\nlines")
    with bench.check("cannot"):
        raise Skipped("no FP8")
    at_home = replace(bench, cuda=False)
    with at_home.check("rehearsed") as found:
        found.figure = "2.00"
    with at_home.check("fails at home"):
        raise ValueError("typo")
    with at_home.check("anywhere", anywhere=True):
        pass
    expected = [
        (PASS, "1.00"),
        (FAIL, "ValueError: two lines"),
        (SKIP, "no FP8"),
        (SKIP, "no CUDA device; rehearsed: 2.00"),
        (FAIL, "ValueError: typo"),
        (PASS, ""),
    ]
    assert [(check.state, check.figure) for check in bench.checks()] == expected
    assert closing_table(bench.checks()).splitlines()[-1] == "2 PASS, 2 FAIL, 2 SKIP"
    assert Bench.from_json(bench.to_json()) == bench


# ---------------------------------------------------------------- processes


def test_a_hanging_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    began = time.monotonic()
    status = fresh(["-c", HANGS], environment=os.environ, log=log, timeout_s=1.0, own_group=True)
    assert status is None
    assert time.monotonic() - began < 30
    assert log.read_text() == "began\n"
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


@pytest.mark.parametrize(("action", "expected"), [(lambda: 0, 0), (lambda: 3, 3), (lambda: time.sleep(60), None)])
def test_a_fork_has_status_and_time_out(action: object, expected: int | None, tmp_path: Path) -> None:
    assert callable(action)
    log = tmp_path / "log"
    assert forked(action, environment=os.environ, log=log, timeout_s=1.0, own_group=True) == expected


def test_a_step_that_dies_is_a_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """What it had found by then stays."""
    earlier = Check("nonesuch", "first", PASS, "1.00")
    bench.of("nonesuch").report(earlier)
    checks = _run_step(Step("nonesuch", 30, "nonesuch", "nothing"), bench, 30.0)
    assert checks[0] == earlier
    assert [(check.name, check.state) for check in checks[1:]] == [("its process", FAIL)]
    assert checks[1].figure.startswith("ended with status 1: StopIteration")
    assert [check.state for check in _run_step(STEPS[1], bench, 1.0)] == [SKIP]


# ---------------------------------------------------------------- packing


def test_a_folder_that_would_not_travel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not an ignored folder"):
        pack(tmp_path / "new", Contents())
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="not empty"):
        pack(tmp_path, Contents())


def test_results_are_whole_after_every_step(tmp_path: Path) -> None:
    write_results(tmp_path, [Check("a", "b", PASS, "c")], seconds=1.0)
    assert json.loads((tmp_path / "results.json").read_text())["checks"][0]["figure"] == "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]
