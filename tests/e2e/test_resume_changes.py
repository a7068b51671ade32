"""A run resumed with other batches trains what is asked; a resume that is refused leaves every file as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod
from tests.helpers.text import write_corpus

CONFIG = """
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 24}
precision: {dtype: fp32}
data: {train: [%s, %s], tokenizer: %s, seq_length: 32}
train: {train_steps: 10, global_batch_size: 8, eval_interval: 0}
statistics: {variance: {interval: 0}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on two small corpora."""
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = "train:300"
    for seed, name in enumerate(("a", "b")):
        write_corpus(folder / f"text-{name}", documents=4, sentences=20, seed=seed)
        options = ("--tokenizer", tokenizer, "--workers", "1")
        sparsecod("data", "--input", folder / f"text-{name}", "--output", folder / name, *options)
        tokenizer = str(folder / "a_tokenizer")
    (folder / "run.yaml").write_text(CONFIG % (folder / "a_train", folder / "b_train", folder / "a_tokenizer"))
    return folder / "run.yaml"


def digests(run: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """Ten steps of eight samples."""
    run = config.parent / "run"
    sparsecod("train", config, f"logging.run_dir={run}")
    return run


@pytest.mark.parametrize(
    ("override", "sizes"),
    [
        ("train.global_batch_size=4", [8] * 10 + [4] * 10),
        ("train.global_batch_size=16", [8] * 10 + [16] * 10),
        # To 8 there are three sizes below, of 53⅓ samples each: 80 consumed are in the second.
        ("train.rampup_batch_size=[2,2,160]", [8] * 10 + [4] * 7 + [6] * 3),
    ],
)
def test_a_resumed_run_may_change_its_batches(
    config: Path, trained: Path, tmp_path: Path, override: str, sizes: list[int]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    sparsecod("train", config, f"logging.run_dir={run}", "train.train_steps=20", override)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["global_batch_size"] for line in lines] == sizes
    assert lines[-1]["tokens"] == 32 * sum(sizes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.num_layers=3",), "model.num_layers"),
        (("model.ffn_hidden_size=32",), "model.ffn_hidden_size"),
        (("data.seq_length=16",), "data.seq_length"),
        (("train.global_batch_size=9", "train.micro_batch_size=2"), "train.global_batch_size"),
        (("data.train=nothing",), "nothing"),
        (("optimizer.optimizer=muon",), "optimizer.optimizer is 'adam' there and 'muon' here"),
    ],
)
def test_a_refused_resume_leaves_every_file_alone(
    config: Path, trained: Path, overrides: tuple[str, ...], said: str
) -> None:
    before = digests(trained)
    result = sparsecod("train", config, f"logging.run_dir={trained}", "train.train_steps=20", *overrides, check=False)
    assert result.returncode == 2 and said in result.stderr
    assert digests(trained) == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.sliding_window=8",), "model.sliding_window is None there and 8 here"),
        (("model.rope_scaling=linear", "model.init_std.qkv=0.1"), "model.rope_scaling is 'none' there"),
        (("model.mup_base_hidden_size=8", "model.hidden_dropout=0.1"), None),
    ],
)
def test_weights_start_a_run_that_computes_something_else_with_them(
    config: Path, trained: Path, tmp_path: Path, overrides: tuple[str, ...], said: str | None
) -> None:
    start = (f"checkpoint.init_from={trained}", f"logging.run_dir={tmp_path / 'run'}", "train.train_steps=1")
    result = sparsecod("train", config, *start, *overrides)
    assert said in result.stderr if said else " there and " not in result.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.qk_norm=true", "k_layernorm.weight is absent there and [2, 8] here (model.qk_norm is False there"),
        ("model.ffn_hidden_size=32", "[2, 48, 16] there and [2, 64, 16] here (model.ffn_hidden_size is 24 there"),
        ("model.untie_embeddings_and_output_weights=false", "output_layer.weight is [384, 16] there and absent"),
        ("model.qkv_bias=true", "linear_qkv.bias is absent there"),
    ],
)
def test_other_weights_start_no_run(config: Path, trained: Path, tmp_path: Path, override: str, said: str) -> None:
    start = (f"checkpoint.init_from={trained}", f"logging.run_dir={tmp_path / 'run'}")
    result = sparsecod("train", config, *start, override, check=False)
    assert result.returncode == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_done_is_left_alone(config: Path, trained: Path) -> None:
    before = digests(trained)
    result = sparsecod("train", config, f"logging.run_dir={trained}", "train.train_steps=7", "optimizer.lr=1")
    assert "nothing to do: already at step 10 of 7" in result.stderr
    assert digests(trained) == before
