"""What a user gets wrong, through the real command line: one line, exit status 2, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod
from tests.helpers.text import write_corpus

pytestmark = pytest.mark.e2e

TINY = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 48}
precision: {dtype: fp32}
data: {prefix: %s, seq_length: 16}
train: {train_steps: 2, global_batch_size: 2, eval_interval: 0}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus `data/corpus`, a configuration and a finished run."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_corpus(folder / "text", documents=8)
    prefix = folder / "data" / "corpus"
    sparsecod("data", "--input", folder / "text", "--tokenizer", "train:300", "--output", prefix, "--workers", "1")
    (folder / "tiny.yaml").write_text(TINY % prefix)
    sparsecod("train", folder / "tiny.yaml", f"logging.run_dir={folder / 'run'}")
    return folder


def refusal(*arguments: str | Path) -> str:
    """The single line on stderr of a command that must exit with 2 and print nothing else."""
    result = sparsecod(*arguments, check=False)
    assert result.returncode == 2, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def train(world: Path, *overrides: str) -> str:
    """What `sparsecod train` refuses with; the new run directory must not appear."""
    run = world / "refused"
    line = refusal("train", world / "tiny.yaml", f"logging.run_dir={run}", *overrides)
    assert not run.exists()
    return line


def test_wrong_key(world: Path) -> None:
    assert "did you mean 'model.num_layers'?" in train(world, "model.num_layer=3")


def test_missing_configuration(world: Path) -> None:
    assert "no such file" in refusal("train", world / "absent.yaml")


def test_layout_that_does_not_fit(world: Path) -> None:
    line = train(world, "parallel.tensor_model_parallel_size=2")
    assert "does not divide 1 processes" in line


def test_missing_data(world: Path) -> None:
    assert "no such file" in train(world, f"data.prefix={world / 'nothing'}")


def test_truncated_bin(world: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(world / "data" / f"corpus_train{suffix}", world / "data" / f"short_train{suffix}")
    path = world / "data" / "short_train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    line = train(world, f"data.train={world / 'data' / 'short_train'}")
    assert "short_train.bin" in line and "cut short" in line


def test_vocabulary_larger_than_the_models(world: Path) -> None:
    line = train(world, "model.vocab_size=128")
    assert "model.vocab_size" in line and "128" in line


def test_checkpoint_of_another_model(world: Path) -> None:
    line = train(world, "model.num_layers=3", f"checkpoint.init_from={world / 'run'}")
    assert "model.num_layers is 2 there and 3 here" in line


def test_checkpoint_of_another_model_from_every_rank_is_one_line(world: Path) -> None:
    line = train(world, "model.hidden_size=64", f"checkpoint.init_from={world / 'run'}", "--nproc", "2")
    assert "model.hidden_size is 32 there and 64 here" in line


def test_resuming_another_model(world: Path) -> None:
    before = {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()}
    line = refusal("train", world / "tiny.yaml", f"logging.run_dir={world / 'run'}", "model.num_layers=4")
    assert "model.num_layers" in line
    assert before == {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()}


def test_not_resuming_over_a_run(world: Path) -> None:
    arguments = ("train", world / "tiny.yaml", f"logging.run_dir={world / 'run'}", "checkpoint.resume=false")
    assert "already holds a run" in refusal(*arguments)


def test_no_checkpoint(world: Path) -> None:
    assert "no checkpoint here" in train(world, f"checkpoint.init_from={world / 'data'}")


def test_damaged_checkpoint(world: Path) -> None:
    copy = world / "damaged"
    shutil.copytree(world / "run", copy)
    for path in copy.rglob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in train(world, f"checkpoint.init_from={copy}")


def test_export_of_nothing_and_over_something(world: Path, tmp_path: Path) -> None:
    assert "no checkpoint here" in refusal("export", "--checkpoint", tmp_path, "--output", tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in refusal("export", "--checkpoint", world / "run", "--output", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_unknown_command() -> None:
    result = sparsecod("trian", check=False)
    assert result.returncode == 2 and "invalid choice" in result.stderr


@pytest.mark.parametrize("command", ["data", "train", "export", "eval", "report"])
def test_help_has_an_example(command: str) -> None:
    assert f"sparsecod {command} " in sparsecod(command, "--help").stdout.split("example:")[1]
