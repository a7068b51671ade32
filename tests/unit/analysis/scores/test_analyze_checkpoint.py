"""`sparsecod analyze` on a training run: the same numbers as on its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from tests.helpers.cli import sparsecod
from tests.helpers.text import write_corpus

pytestmark = pytest.mark.e2e

TINY = """
model: {num_layers: 3, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 48}
precision: {dtype: fp32}
data: {prefix: %s, seq_length: 16}
train: {train_steps: 3, global_batch_size: 2, eval_interval: 0}
"""


def test_a_run_is_analysed_as_its_export_would_be(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=8)
    held_out = next(path for path in sorted((tmp_path / "text").iterdir()) if path.suffix == ".txt")
    prefix, run, exported = tmp_path / "data" / "corpus", tmp_path / "run", tmp_path / "hf"
    made = ["--input", str(tmp_path / "text"), "--tokenizer", "train:300", "--output", str(prefix), "--workers", "1"]
    assert main(["data", *made]) == 0
    (tmp_path / "tiny.yaml").write_text(TINY % prefix, encoding="utf-8")
    sparsecod("train", tmp_path / "tiny.yaml", f"logging.run_dir={run}")
    assert main(["export", "--checkpoint", str(run), "--output", str(exported)]) == 0
    scores = []
    for model in (run, exported):
        output = tmp_path / f"analysis_{model.name}"
        options = ["--data", str(held_out), "--samples", "4", "--seq-length", "16", "--scores", "causal,skip,jacobian"]
        assert main(["analyze", str(model), *options, "--output", str(output)]) == 0
        scores.append(json.loads((output / "scores.json").read_text(encoding="utf-8"))["scores"])
    assert scores[0] == scores[1]
    assert scores[0]["causal"]["values"]["causal"]["value"] > 0
