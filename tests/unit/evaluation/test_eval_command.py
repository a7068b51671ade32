"""`sparsecod eval` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.evaluation.corpus import read_corpus
from tests.helpers.perplexity import perplexity

WriteDataset = Callable[[Sequence[Sequence[int]]], Path]


@pytest.fixture
def dataset(text: str, tokenizer: PreTrainedTokenizerBase, write_dataset: WriteDataset) -> Path:
    return write_dataset(
        [[*tokenizer(part)["input_ids"], tokenizer.eos_token_id] for part in (text[:9000], text[9000:18000])]
    )


def test_perplexity_of_a_dataset(
    model_dir: Path,
    dataset: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(["eval", "--model", str(model_dir), "--perplexity", str(dataset), "--seq-length", "64", "--device", "cpu"])
        == 0
    )
    results = json.loads((model_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    corpus = read_corpus(dataset, tokenizer)
    expected = perplexity(model, corpus.tokens, seq_length=64, num_bytes=corpus.num_bytes)
    assert results["perplexity"]["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert results["perplexity"]["num_bytes"] == 18000 == corpus.num_bytes
    assert results["tasks"] == []
    assert (model_dir / "eval" / "results.md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_limit_counts_windows(model_dir: Path, dataset: Path) -> None:
    arguments = [
        "eval",
        "--model",
        str(model_dir),
        "--perplexity",
        str(dataset),
        "--seq-length",
        "64",
        "--stride",
        "16",
    ]
    assert main([*arguments, "--limit", "3", "--device", "cpu"]) == 0
    results = json.loads((model_dir / "eval" / "results.json").read_text(encoding="utf-8"))["perplexity"]
    assert (results["num_windows"], results["num_tokens"]) == (3, 64 + 16 + 16)


def test_continuation_task_is_made_and_run(model_dir: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    output = tmp_path / "scores"
    arguments = [
        "eval",
        "--model",
        str(model_dir),
        "--continuation-task",
        str(dataset),
        "--questions",
        "8",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--output", str(output)]) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [(row["task"], row["metric"], row["num_samples"]) for row in results["tasks"]] == [
        ("true_continuation", "acc", 8),
        ("true_continuation", "acc_norm", 8),
    ]
    assert results["perplexity"] is None
    assert len((output / "tasks" / "true_continuation.jsonl").read_text(encoding="utf-8").splitlines()) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", " , "], "--tasks ' , ': names no task"),
        (["--perplexity", "absent"], "absent: no such text file"),
        (["--perplexity", "{text}", "--seq-length", "512"], "--seq-length 512: the model takes at most 256"),
        (["--perplexity", "{text}", "--seq-length", "8", "--stride", "9"], "--stride 9: must be 1 to --seq-length 8"),
        (["--perplexity", "{text}", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--perplexity", "{text}", "--batch-size", "-1"], "--batch-size -1: must be at least 1"),
        (["--perplexity", "{text}", "--include-path", "."], "--include-path .: has no effect without --tasks"),
        (["--perplexity", "{text}", "--nproc", "0"], "--nproc 0: must be at least 1"),
        (["--continuation-task", "{text}"], "0 passages of 64 words"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = tmp_path / "short.txt"
    source.write_text("a short text", encoding="utf-8")
    filled = [option.format(text=source) for option in options]
    capsys.readouterr()
    assert main(["eval", "--model", str(model_dir), "--device", "cpu", *filled]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsecod eval: ")]
    assert len(error) == 1 and message in error[0]
    assert not (model_dir / "eval").exists()


def test_without_anything_asked_for_the_papers_tasks_are_run(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, that is one line, which says what is missing."""
    pytest.importorskip("lm_eval")
    assert main(["eval", "--model", str(model_dir), "--device", "cpu"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsecod eval: ")]
    assert len(error) == 1 and "task 'mmlu': its data cannot be loaded" in error[0] and "cais/mmlu" in error[0]


def test_models_are_compared(
    model_dir: Path, make_llama: Callable[..., LlamaForCausalLM], dataset: Path, tmp_path: Path
) -> None:
    """Identical models differ by nothing; the others' differences are those of their own results."""
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(model_dir, same)
    shutil.copytree(model_dir, other)
    make_llama(num_hidden_layers=1).save_pretrained(other)
    arguments = ["--perplexity", str(dataset), "--limit", "20", "--seq-length", "32", "--device", "cpu"]
    models = [str(model_dir), str(same), str(other)]
    assert main(["eval", "--model", *models, *arguments, "--output", str(tmp_path / "compared")]) == 0
    compared = json.loads((tmp_path / "compared" / "results.json").read_text(encoding="utf-8"))
    assert list(compared["models"]) == models
    losses = [compared["models"][model]["perplexity"]["loss"] for model in models]
    found = {(row["model"], row["metric"]): row for row in compared["differences"]}
    assert losses[0] == losses[1] != losses[2]
    assert (found[str(same), "loss"]["value"], found[str(same), "loss"]["stderr"]) == (0, 0)
    assert found[str(other), "loss"]["value"] == losses[2] - losses[0] and found[str(other), "loss"]["paired"]
    assert main(["eval", "--model", str(other), *arguments]) == 0
    alone = json.loads((other / "eval" / "results.json").read_text(encoding="utf-8"))
    assert alone["perplexity"] == compared["models"][str(other)]["perplexity"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{model}", "{model}"], "given twice"),
        (["{model}", "absent"], "--output: not given, and 2 models have no folder in common"),
        (["absent"], "absent: no such folder"),
        (["."], ".: no checkpoint here"),
    ],
)
def test_models_that_cannot_be_used(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    models: list[str],
    message: str,
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("some text", encoding="utf-8")
    monkeypatch.chdir(source.parent)
    filled = [model.format(model=model_dir) for model in models]
    assert main(["eval", "--model", *filled, "--perplexity", str(source), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_tokens_of_another_tokenizer(
    model_dir: Path, write_dataset: WriteDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_dataset([[1, 2, 3, 40_000, 4]])
    assert main(["eval", "--model", str(model_dir), "--perplexity", str(prefix), "--device", "cpu"]) == 2
    assert "token id 40000 at position 4, but the model's vocabulary has 300 entries" in capsys.readouterr().err


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from sparsecod_megatron.cli.main import main\n"
        "try: main(['eval', '--help'])\n"
        "finally: print('heavy:', sorted({'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--continuation-task" in shown.stdout and "heavy: []" in shown.stdout
