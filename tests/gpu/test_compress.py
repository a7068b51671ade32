"""Compression on a GPU: the zeros and losses of a CPU but for rounding, whole and with one block in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from tests.helpers.decoders import VOCAB_SIZE, tiny_decoder
from tests.helpers.streaming import same_zeros, tensors
from tests.helpers.words import save_with_words, write_words

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
METHODS = ("wanda+dsnot", "obs", "sparsegpt+cg")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rules_prune_as_on_a_cpu(family: str, tmp_path: Path) -> None:
    model = tiny_decoder(family)
    assert model is not None
    folder, text = save_with_words(model, tmp_path / "model"), write_words(tmp_path / "words.txt", VOCAB_SIZE, 600)
    command = ["compress", "--model", str(folder), "--data", str(text), "--method", ",".join(METHODS)]
    command += ["--pattern", "0.5,2:4", "--samples", "8", "--held-out", "5", "--seq-length", "16"]
    for name, extra in (("cpu", ["cpu"]), ("whole", [DEVICE]), ("streamed", [DEVICE, "--stream"])):
        assert main([*command, "--output", str(tmp_path / name), "--device", *extra]) == 0
    for method in METHODS:
        for pattern in ("0.5", "2-4"):
            found = {name: tensors(tmp_path / name / f"{method}_{pattern}") for name in ("cpu", "whole", "streamed")}
            assert same_zeros(found["cpu"], found["whole"]) >= 0.99
            assert same_zeros(found["whole"], found["streamed"]) >= 0.9999
    rows = [json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("cpu", "whole", "streamed")]
    for on_cpu, *others in zip(*rows, strict=True):
        for row in others:
            assert row["perplexity"]["loss"] == pytest.approx(on_cpu["perplexity"]["loss"], abs=0.02)
