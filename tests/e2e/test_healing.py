"""Prune, import, train with the dense model as teacher on two processes, export: the zeros are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.cli import read_jsonl, sparsecod, sparsecod_ranks
from tests.helpers.hf_models import write_llama
from tests.helpers.text import write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.dist]


def test_a_pruned_model_heals(tmp_path: Path) -> None:
    corpus, dense = tmp_path / "corpus", tmp_path / "dense"
    write_corpus(tmp_path / "text", documents=8, sentences=20)
    options = ("--tokenizer", "train:300", "--val-fraction", "0.2", "--workers", "1")
    sparsecod("data", "--input", tmp_path / "text", "--output", corpus, *options)
    # The shape of SmolLM2: tied embeddings, grouped queries.
    write_llama(dense, vocab_size=384, max_position_embeddings=32, tie_word_embeddings=True, num_hidden_layers=4)
    shutil.copytree(tmp_path / "corpus_tokenizer", dense, dirs_exist_ok=True)
    sample = ("--samples", "2", "--held-out", "2", "--seq-length", "16")
    pruned = ("--method", "magnitude", "--set", "pattern=2:4", "--data", f"{corpus}_val", "--output", tmp_path / "2of4")
    sparsecod("compress", "--model", dense, *pruned, *sample)
    sparsecod("import", "--hf", tmp_path / "2of4", "--output", tmp_path / "imported")
    sparsecod_ranks(
        "train",
        tmp_path / "imported/config.yaml",
        f"checkpoint.init_from={tmp_path / 'imported'}",
        f"data.prefix={corpus}",
        f"logging.run_dir={tmp_path / 'run'}",
        f"mechanisms.distillation={{teacher: {dense}, squarehead: 1, kl: 1}}",
        "mechanisms.frozen_masks={}",
        "precision.dtype=fp32",
        "train.train_steps=12",
        "train.global_batch_size=4",
        "train.eval_interval=0",
        "optimizer.lr=3e-3",
        "schedule.lr_decay_style=constant",
        "parallel.tensor_model_parallel_size=2",
        nproc=2,
    )
    records = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert records[-1]["distillation_squarehead"] < 0.9 * records[0]["distillation_squarehead"]
    assert {record["live_share"] for record in records} == {0.5}
    assert "weights stay zero (0.5000)" in (tmp_path / "run/log.txt").read_text()
    sparsecod("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "healed")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("2of4", "healed"))
    for name, weight in after.items():
        if ".layers." in name and weight.dim() == 2:
            assert ((weight == 0) == (before[name] == 0)).all() and (weight == 0).float().mean() == 0.5
            assert not (weight == before[name]).all()
    assert json.loads((tmp_path / "healed/sparsity.json").read_text())
