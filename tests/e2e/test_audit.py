"""`sparsecod audit` from the command line: its table, its file, its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod

pytestmark = pytest.mark.e2e
CONFIG = "examples/configs/nano_lns.yaml"


def test_red_is_exit_1(tmp_path: Path) -> None:
    """A model that leaves the numbers at once, so that it cannot be compared; README's test has one that is green."""
    only = ("--nproc", "1", "--only", "1 process", "--output", tmp_path)
    red = sparsecod("audit", CONFIG, "optimizer.lr=1e30", "optimizer.clip_grad=0", *only, check=False)
    assert red.returncode == 1
    assert red.stderr == "sparsecod audit: 1 of 1 rows red, the first: 1 process\n"
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["red"] == ["1 process"]
    assert f"1 process: {content['rows'][0]['first']}" in red.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nproc", "3"), "layouts use 1, 2 or 4 processes"),
        (("--only", "dp3"), "no row has this name"),
        (("model.num_layers=0",), "model.num_layers"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = sparsecod("audit", CONFIG, *arguments, "--output", tmp_path / "out", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
