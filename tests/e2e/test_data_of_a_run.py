"""The data of a real run: blends, a loss for each validation source, and what a resume may change and what not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli import read_jsonl, sparsecod
from tests.helpers.text import write_corpus

pytestmark = pytest.mark.e2e

CONFIG = """
model: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 16}
precision: {dtype: fp32}
data: {train: [0.3, DATA/a_train, 0.7, DATA/b_train], validation: [1, DATA/a_val, 3, DATA/b_val], seq_length: 16,
       tokenizer: DATA/a_tokenizer}
schedule: {lr_decay_style: constant}
train: {train_steps: 30, global_batch_size: 4, eval_interval: 30, eval_steps: 1}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration over two small corpora, which 30 steps and 60 steps repeat a different number of times."""
    folder = tmp_path_factory.mktemp("data_of_a_run")
    (folder / "run.yaml").write_text(CONFIG.replace("DATA", str(folder)))
    for seed, (name, tokenizer) in enumerate((("a", "train:300"), ("b", str(folder / "a_tokenizer")))):
        write_corpus(folder / name, documents=4, seed=seed)
        make = ["--tokenizer", tokenizer, "--output", folder / name, "--workers", "1", "--val-fraction", "0.4"]
        sparsecod("data", "--input", folder / name, *make)
    sparsecod("train", folder / "run.yaml", f"logging.run_dir={folder / 'run'}")
    return folder


def metrics(run: Path) -> list[dict]:
    return read_jsonl(run / "metrics.jsonl")


def test_each_validation_source_has_its_loss(world: Path) -> None:
    last = metrics(world / "run")[29]
    a, b = last["validation_loss/a_val"], last["validation_loss/b_val"]
    assert a != b
    assert last["validation_loss"] == pytest.approx((a + 3 * b) / 4)


def test_more_steps_on_resume_leave_the_order_of_samples(world: Path) -> None:
    sparsecod("train", world / "run.yaml", f"logging.run_dir={world / 'run'}", "train.train_steps=60")
    sparsecod("train", world / "run.yaml", f"logging.run_dir={world / 'whole'}", "train.train_steps=60")
    resumed, whole = ([line["loss"] for line in metrics(world / name)] for name in ("run", "whole"))
    assert len(whole) == 60
    assert resumed == whole


def test_other_data_are_refused_unless_told(world: Path) -> None:
    command = ["train", world / "run.yaml", f"logging.run_dir={world / 'run'}", "train.train_steps=61"]
    changed = f"data.train=[0.4,{world}/a_train,0.6,{world}/b_train]"
    before = (world / "run" / "config.yaml").read_bytes()
    result = sparsecod(*command, changed, check=False)
    assert result.returncode == 2
    assert "data.train: changed since the checkpoint (weight of source 1: 0.3 there, 0.4 here)" in result.stderr
    assert (world / "run" / "config.yaml").read_bytes() == before
    sparsecod(*command, changed, "data.allow_changed=true")
