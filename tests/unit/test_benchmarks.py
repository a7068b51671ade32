"""Every benchmark starts as a script and as a module, from a shell that knows nothing of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_benchmarks_find_what_they_import(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", START, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
