"""The quickstart's own script, shortened, in a folder of its own; its commands run in forks of the tests' server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod, sparsecod_ranks

pytestmark = pytest.mark.e2e
IN_VENV = f"""
if [ "$1" != sparsecod ]; then exec "$@"; fi
shift
exec "{sys.executable}" -c '
import sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as asked:
    asked.send(sys.argv[2:])
    status, printed, said = asked.recv()
sys.stdout.write(printed)
sys.stderr.write(said)
sys.exit(status)
' "$COMMANDS" "$@"
"""
"""Stands for tools/run_in_venv.sh, which test_packaging.py tries: a new interpreter a command takes minutes in all."""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Path]:
    """Socket that takes arguments of `sparsecod`, `--nproc` without its launcher, and gives status and output."""
    with Listener(str(tmp_path / "commands"), family="AF_UNIX") as listener:

        def serve() -> None:
            while True:
                with listener.accept() as asked:
                    arguments = asked.recv()
                    if arguments is None:
                        return
                    if "--nproc" in arguments:
                        place = arguments.index("--nproc")
                        _, nproc = arguments[place : place + 2]
                        del arguments[place : place + 2]
                        result = sparsecod_ranks(*arguments, nproc=int(nproc), check=False)
                    else:
                        result = sparsecod(*arguments, check=False)
                    asked.send((result.returncode, result.stdout, result.stderr))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield tmp_path / "commands"
        with Client(str(tmp_path / "commands")) as last:
            last.send(None)
        thread.join()


@pytest.mark.timeout(900)
def test_quickstart(repo_root: Path, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything it promises to leave behind is there, and it says by how much the losses fell."""
    (tmp_path / "examples").symlink_to(repo_root / "examples")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "run_in_venv.sh").write_text(IN_VENV)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "quickstart"
    result = subprocess.run(
        ["bash", str(tmp_path / "examples" / "quickstart.sh"), str(output)],
        env=os.environ | {"STEPS": "5", "DOCUMENTS": "400", "QUESTIONS": "10", "COMMANDS": str(commands)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
    for name in ("dense", "moe"):
        run = output / name
        assert (run / "checkpoints" / "latest").read_text() == "step_00000005\n"
        assert "resumed from" in (run / "log.txt").read_text() + result.stderr
        assert (output / f"{name}-hf" / "model.safetensors").exists()
        assert "true_continuation" in (output / f"{name}-eval" / "results.md").read_text()
        assert f"{name}: loss" in result.stdout
    assert result.stdout.count("argmax agreement 100.00%") == 4  # two exports; random and greedy tokens
    for name in ("variance_by_depth.png", "report.html"):
        assert (output / name).stat().st_size > 10_000
