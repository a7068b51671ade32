"""`sparsecod compress` on two processes: the masks, perplexities and tables of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.cli.main import main
from tests.helpers.cli import sparsecod_ranks
from tests.helpers.streaming import same_zeros, tensors
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import VOCAB_SIZE, tiny

pytestmark = pytest.mark.e2e


def test_two_processes_prune_what_one_prunes(tmp_path: Path) -> None:
    model = save_with_words(tiny("mixtral"), tmp_path / "model")
    text = write_words(tmp_path / "text.txt", VOCAB_SIZE, 3000)
    common = ["compress", "--model", str(model), "--data", str(text), "--device", "cpu"]
    common += ["--samples", "7", "--held-out", "5", "--seq-length", "16", "--set", "allocation=influence"]
    command = [*common, "--method", "gblm,sparsegpt+cg,neurons,slicegpt", "--scores", "causal"]
    sparsecod_ranks(*command, "--output", tmp_path / "two", nproc=2)
    sparsecod_ranks(*common, "--method", "sparsegpt+cg", "--stream", "--output", tmp_path / "streamed", nproc=2)
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second["perplexity"]["perplexity"] == pytest.approx(first["perplexity"]["perplexity"], rel=1e-4)
        assert second["warnings"] == first["warnings"]
    pairs = [(tmp_path / "one" / name, tmp_path / "two" / name) for name in ("gblm_0.5", "sparsegpt+cg_0.5")]
    for first, second in (*pairs, (tmp_path / "two" / "sparsegpt+cg_0.5", tmp_path / "streamed")):
        ours, theirs = tensors(first), tensors(second)
        assert same_zeros(ours, theirs) >= 0.9999
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items()), "streamed by two as held by two"


def test_two_processes_make_the_modules_that_one_makes(tmp_path: Path) -> None:
    """Clusters and ranks are found from all sequences together, and matrices are dealt out."""
    model = save_with_words(tiny("qwen2_moe"), tmp_path / "model")
    text = write_words(tmp_path / "text.txt", VOCAB_SIZE, 3000)
    command = ["compress", "--model", str(model), "--data", str(text), "--device", "cpu"]
    command += ["--samples", "7", "--held-out", "5", "--seq-length", "16", "--method", "sparse_expansion,welore"]
    command += ["--set", "clusters=2", "by=outputs", "saved=0.05"]
    sparsecod_ranks(*command, "--output", tmp_path / "two", nproc=2)
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    for name in ("sparse_expansion_0.5", "welore"):
        one, two = (tmp_path / number / name for number in ("one", "two"))
        told = [json.loads((folder / "config.json").read_text())["structure"] for folder in (one, two)]
        assert told[0] == told[1]
        ours, theirs = tensors(one), tensors(two)
        assert ours.keys() == theirs.keys()
        assert same_zeros(ours, theirs) >= 0.9999
    rows = [json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert second["perplexity"]["perplexity"] == pytest.approx(first["perplexity"]["perplexity"], rel=1e-4)
        assert second["warnings"] == first["warnings"]
