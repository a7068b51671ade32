"""`sparsecod compress` on two processes: the masks, perplexities and tables of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparsecod_megatron.cli.main import main
from tests.helpers.cli import sparsecod_ranks
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import VOCAB_SIZE, tiny

pytestmark = pytest.mark.e2e


def test_two_processes_prune_what_one_prunes(tmp_path: Path) -> None:
    model = save_with_words(tiny("mixtral"), tmp_path / "model")
    text = write_words(tmp_path / "text.txt", VOCAB_SIZE, 3000)
    command = ["compress", "--model", str(model), "--data", str(text), "--device", "cpu", "--scores", "causal"]
    command += ["--samples", "7", "--held-out", "5", "--seq-length", "16"]
    command += ["--method", "gblm,sparsegpt+cg,neurons,slicegpt", "--set", "allocation=influence"]
    sparsecod_ranks(*command, "--output", tmp_path / "two", nproc=2)
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second["perplexity"]["perplexity"] == pytest.approx(first["perplexity"]["perplexity"], rel=1e-4)
        assert second["warnings"] == first["warnings"]
    for name in ("gblm_0.5", "sparsegpt+cg_0.5"):
        ours, theirs = (load_file(tmp_path / number / name / "model.safetensors") for number in ("one", "two"))
        same = sum(int(((ours[key] == 0) == (theirs[key] == 0)).sum()) for key in ours)
        assert same >= 0.9999 * sum(weight.numel() for weight in ours.values())
