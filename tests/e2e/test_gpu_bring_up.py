"""The script of the bring-up itself, rehearsed without a card: no step fails, and each says what it waits for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT, sparsecod
from tests.helpers.text import write_corpus
from tools.gpu_bring_up.pack import Contents, fill
from tools.gpu_bring_up.steps import STEPS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
MODEL = ("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "data.seq_length=32")
ANYWHERE = {"versions", "wheels", "Transformer Engine's archive", "megatron-core", "sparsecod_megatron"}
"""What a machine without a card proves as well."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and a CPU checkpoint as `--pack` makes them; a wheel and an archive with nothing to speak of."""
    folder = tmp_path_factory.mktemp("packed")
    corpus = write_corpus(folder.parent / "corpus")
    contents = Contents(wheels=False, corpus=str(corpus), tokenizer="train:512", overrides=MODEL, steps=2)
    fill(folder, contents, sparsecod)
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels/rehearsed-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rehearsed.py", "")
        wheel.writestr("rehearsed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: rehearsed\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("rehearsed-1.0.dist-info/WHEEL", tags)
        wheel.writestr("rehearsed-1.0.dist-info/RECORD", "")
    with tarfile.open(folder / "te_rehearsed.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("rehearsed_engine.py"), io.BytesIO())
    return folder


def test_every_step_is_rehearsed(packed: Path, tmp_path: Path) -> None:
    moved = packed.rename(tmp_path / "elsewhere")  # as on another machine
    command = ["bash", str(ROOT / "tools/gpu_bring_up.sh"), str(moved), "out", "--seconds", "5400"]
    environment = os.environ | {"SPARSECOD_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    checks = results["checks"]
    assert [step.name for step in STEPS] == list(dict.fromkeys(check["step"] for check in checks))
    for check in checks:
        where = f"{check['step']}: {check['name']}: {check['figure']}"
        if check["name"] in ANYWHERE:
            assert check["state"] == "PASS", where
        else:
            assert check["state"] == "SKIP", where
            assert any(word in check["figure"] for word in ("CUDA device", "does not import", "not installed")), where
    rehearsed = [check for check in checks if "rehearsed: " in check["figure"]]
    assert len(rehearsed) > 30, "too few checks ran their body"
    assert done.stdout.splitlines()[-1] == f"{len(ANYWHERE)} PASS, 0 FAIL, {len(checks) - len(ANYWHERE)} SKIP"
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == ["log.txt", "profile.txt", "results.json", "table.md"]
    assert "Rehearsal without a card" in (tmp_path / "out/table.md").read_text()
