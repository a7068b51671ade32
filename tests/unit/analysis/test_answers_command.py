"""`sparsecod analyze --scores answers` as a user types it: a file, what is made here, a run's own task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.analysis.scores.answers import collect_sums
from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.tasks.synthetic import synthetic_items
from sparsecod_megatron.cli.main import main
from sparsecod_megatron.config import load_config
from sparsecod_megatron.data.synthetic.dataset import task_tokenizer
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.models.opening import open_model
from tests.helpers.questions import write_questions
from tests.helpers.words import save_with_words, write_words
from tests.unit.analysis.scores.families import VOCAB_SIZE, tiny
from tests.unit.checkpoint.test_stream import write

ASK = ["--device", "cpu", "--scores", "answers"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_words(tiny("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("task") / "questions.jsonl", VOCAB_SIZE, 10)


def scores(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "scores.json").read_text(encoding="utf-8"))
    return content


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("sparsecod analyze: ")]
    return line


def test_a_file_of_questions(llama: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without text, in one analysis, in a series, and compared only where the same was asked."""
    output = tmp_path / "answers"
    asked = [*ASK, "--task", str(questions)]
    assert main(["analyze", str(llama), *asked, "--output", str(output)]) == 0
    found = scores(output)
    assert (found["settings"]["task"], found["settings"]["items"]) == (str(questions), 10)
    assert "data" not in found["settings"]
    result = found["scores"]["answers"]
    assert {row["difficulty"] for row in result["tables"]["answers"]} == {"all", "1", "2"}
    assert len(result["tables"]["answers"]) == 3 * (1 + 3 + 2 + 3)
    assert {figure["name"] for figure in result["figures"]} == {
        f"answers_{kind}_{what}" for kind in ("skip", "swap", "erase") for what in ("exact_match", "log_likelihood")
    }
    assert (output / "plots/answers_skip_exact_match.png").is_file()
    assert "says no answer word for word" in capsys.readouterr().out

    with_text = ["--data", str(write_words(tmp_path / "text.txt", VOCAB_SIZE, 1000)), "--seq-length", "12"]
    both = [*asked[:-3], "skip,answers", *asked[-2:], *with_text]
    assert main(["analyze", str(llama), *both, "--output", str(tmp_path / "both")]) == 0
    assert scores(tmp_path / "both")["scores"]["answers"] == result

    pair = [str(llama), str(llama)]
    assert main(["analyze", *pair, *asked, "--every-checkpoint", "--output", str(tmp_path / "series")]) == 0
    changes = scores(tmp_path / "series")["scores"]["answers"]["tables"]["answers_changes"]
    assert "skip_exact_match" in {row["name"] for row in changes} and not any(row["difference"] for row in changes)
    other = ["--every-checkpoint", "--output", str(tmp_path / "series")]
    assert f"measured with task {questions}, not hops" in said(capsys, *pair, *ASK, "--task", "hops", *other)

    fewer = [*asked, "--samples", "6", "--output", str(tmp_path / "fewer")]
    assert main(["analyze", str(llama), *fewer]) == 0
    assert scores(tmp_path / "fewer")["settings"]["items"] == 6
    assert "measured on different sequences" in said(
        capsys, "--compare", str(output), str(tmp_path / "fewer"), "--output", str(tmp_path / "compared")
    )


def test_a_runs_own_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out samples of its `data.synthetic`, scored as they are there."""
    settings = ["data.synthetic={task: recall, vocab_size: 8}", "data.seq_length=16", "model.vocab_size=9"]
    run = tmp_path / "run"
    write(run / "checkpoints", *settings)
    task = task_of(load_config(None, settings).data)
    assert task is not None
    task_tokenizer(task).save_pretrained(run / "tokenizer")
    command = [
        str(run),
        *ASK,
        "--task",
        "synthetic",
        "--no-verify",
        "--samples",
        "4",
        "--output",
        str(tmp_path / "own"),
    ]
    assert main(["analyze", *command]) == 0
    found = scores(tmp_path / "own")["scores"]["answers"]
    items = synthetic_items(task, seq_length=16, count=4, seed=0)
    with open_model(run, device="cpu", verify=False) as opened:
        context = make_context(opened.model, None, num_samples=4, seq_length=1, seed=0, items=items)
        sums = collect_sums(context, items).sum(dim=(0, 2))
    assert found["num_tokens"] == int((items.level >= 0).sum()) == int(sums[0, 2])
    values = {name: value["value"] for name, value in found["values"].items()}
    assert values["accuracy"] == values["exact_match"] == pytest.approx(float(sums[0, 3] / sums[0, 2]))
    likelihood = torch.log_softmax(opened_logits(run, items.tokens), dim=-1).gather(-1, items.labels[..., None])[..., 0]
    assert values["log_likelihood"] == pytest.approx(float(likelihood[items.level >= 0].mean()), abs=1e-4)
    assert "model is not a run on data.synthetic" in said(
        capsys, str(save_with_words(tiny("llama"), tmp_path / "model")), *command[1:-1], str(tmp_path / "no")
    )


@torch.no_grad()
def opened_logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    with open_model(run, device="cpu", verify=False) as opened:
        logits: torch.Tensor = opened.model(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--scores", "answers"],
            "--scores answers: asks for answers; give --task addition, hops, synthetic or a file",
        ),
        (["--scores", "skip", "--task", "hops"], "--task hops: no score asks it"),
        (["--scores", "skip"], "--scores skip: measured on text, and none is given; give --data"),
        (["--scores", "answers", "--task", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--scores", "answers", "--task", "a.jsonl", "--difficulties", "1"], "only of --task addition and hops"),
        (["--scores", "answers", "--task", "hops", "--difficulties", "1,x"], "give whole numbers"),
        (["--scores", "answers", "--task", "hops"], "--task hops: 117 tokens: the model takes at most 64"),
    ],
)
def test_mistakes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    line = said(capsys, str(llama), "--device", "cpu", *options, "--output", str(tmp_path / "no"))
    assert message in line
    assert not (tmp_path / "no").exists()
