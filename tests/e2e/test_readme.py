"""The commands that the README prints run in its order; those for a cluster name files that exist."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
APPENDED = {"data": ("--max-documents", "400"), "train": ("train.train_steps=10",)}
"""To the arguments that are printed, of which nothing is left out: less text, fewer steps."""


def commands() -> list[str]:
    """Every line of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(900)
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data, train, export, eval and report follow from each other."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands():
        program, *arguments = shlex.split(line, comments=True)
        if program == "sparsecod":
            sparsecod(*arguments, *APPENDED.get(arguments[0], ()))
            ran.append(arguments[0])
    assert " ".join(ran) == "data train plan audit export import eval analyze compress study report doctor"
    losses = [json.loads(row)["loss"] for row in (tmp_path / "runs/quickstart_dense/metrics.jsonl").open()]
    assert losses[-1] < losses[0] - 0.3
    tasks = json.loads((tmp_path / "exported/dense/eval/results.json").read_text())["tasks"]
    assert tasks and all(math.isfinite(task["value"]) for task in tasks)
    audited = json.loads((tmp_path / "audits/moe/audit.json").read_text())
    assert ([row["row"] for row in audited["rows"]], audited["red"]) == (["1 process", "ep2"], [])
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_cluster_commands_name_files_that_exist() -> None:
    for line in commands():
        for path in re.findall(r"(?:examples|tests|tools)/[\w./-]+", line):
            assert (ROOT / path).exists(), line


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
