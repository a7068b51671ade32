"""Every benchmark starts as a script and as a module, from a shell that knows nothing of the repository."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mechanisms import UPDATES, run_config
from sparsecod_megatron.mechanisms import MECHANISMS

ROOT = Path(__file__).resolve().parents[2]
START = """
import itertools, runpy, sys
from pathlib import Path

import pytest
root = Path(sys.argv[1])
before = list(sys.path[1:])
for way, file in itertools.product(("script", "module"), sorted((root / "benchmarks").glob("*.py"))):
    sys.path[:] = [str(root if way == "module" else file.parent), *before]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "benchmarks")]:
        del sys.modules[name]  # what one found is not there for the next
    started = runpy.run_module(f"benchmarks.{file.stem}") if way == "module" else runpy.run_path(str(file))
    assert callable(started["main"]), (way, file)
"""


@pytest.mark.parametrize("name", MECHANISMS.names)
def test_every_mechanism_can_be_measured(name: str) -> None:
    """With a run that is the same but for it; that all of them run takes minutes."""
    on, off = (run_config(name, experts=0, is_on=is_on) for is_on in (True, False))
    assert list(on.mechanisms) == [name] and not off.mechanisms
    assert dataclasses.replace(on, mechanisms={}) == off
    assert name not in UPDATES or run_config(name, experts=0, interval=3).mechanisms[name].interval == 3


@pytest.mark.slow
def test_benchmarks_find_what_they_import(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", START, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
