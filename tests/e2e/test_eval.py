"""`sparsecod eval` of runs and real models, on several processes, and while a run trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.cli.main import main
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from tests.helpers.cli import read_jsonl, sparsecod_ranks
from tests.helpers.text import write_corpus

pytestmark = pytest.mark.e2e
pytest.importorskip("lm_eval")

CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 48, hidden_dropout: 0.1}
precision: {dtype: fp32}
data: {prefix: %s, seq_length: 64}
train: {train_steps: 3, global_batch_size: 2, eval_interval: 0}
statistics: {variance: {interval: 0}}
checkpoint: {save_interval: 0}
"""
QUESTIONS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus `data/corpus`, a configuration, and a task over the corpus in `tasks`."""
    from sparsecod_megatron.evaluation.continuation_task import write_continuation_task

    folder = tmp_path_factory.mktemp("eval")
    texts = [path.read_text() for path in write_corpus(folder / "text", documents=12).iterdir()]
    prefix = folder / "data" / "corpus"
    source = [str(folder / "text"), "--tokenizer", "train:300", "--output", str(prefix)]
    assert main(["data", "--input", *source, "--val-fraction", "0.1", "--workers", "1"]) == 0
    write_continuation_task(texts, folder / "tasks", num_questions=QUESTIONS, context_words=20, continuation_words=4)
    (folder / "config.yaml").write_text(CONFIG % prefix)
    return folder


def evaluated(world: Path) -> list[str]:
    return [
        "evaluation.interval=2",
        "evaluation.tasks=[true_continuation]",
        f"evaluation.include_path={world / 'tasks'}",
    ]


def trained(
    world: Path, name: str, *overrides: str, evaluate: Callable[[Path], dict[str, float]] | None = None
) -> Path:
    """Train in this process, as `sparsecod train` does."""
    run = world / name
    config = load_config(world / "config.yaml", [f"logging.run_dir={run}", *overrides])
    backend = select_backend()
    from sparsecod_megatron.cli.task_evaluation import task_evaluator
    from sparsecod_megatron.train import run_training

    if evaluate is None and config.evaluation.interval:
        evaluate = task_evaluator(config.evaluation, backend.device.type)
    run_training(config, backend, evaluate)
    return run


def task_values(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("task/")}


def rows(output: Path) -> dict[str, float]:
    """results.json under the names that a run in training gives them."""
    values = {}
    for row in json.loads((output / "results.json").read_text())["tasks"]:
        values[f"task/{row['task']}/{row['metric']}"] = row["value"]
        values[f"task/{row['task']}/{row['metric']}_stderr"] = row["stderr"]
    return values


def scoring(world: Path, run: Path, step: int, output: Path) -> list[str]:
    """The arguments of an evaluation of one step of a run."""
    model, tasks = run / "checkpoints" / f"step_{step:08d}", world / "tasks"
    of_text = ["--perplexity", str(world / "data" / "corpus_val"), "--seq-length", "16", "--batch-size", "8"]
    of_tasks = ["--tasks", "true_continuation", "--include-path", str(tasks)]
    return ["eval", "--model", str(model), *of_text, *of_tasks, "--output", str(output)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU runs bit for bit")
def test_evaluation_leaves_training_alone(world: Path) -> None:
    """Losses bit for bit those of a run without, under dropout; numbers those of `sparsecod eval` on the same step."""
    plain = read_jsonl(trained(world, "plain") / "metrics.jsonl")
    run = trained(world, "evaluated", *evaluated(world))
    records = read_jsonl(run / "metrics.jsonl")
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]
    assert [record["step"] for record in records if task_values(record)] == [2, 3]
    assert sorted(path.name[-1] for path in (run / "checkpoints").glob("step_*")) == ["2", "3"]
    output = world / "of-step-2"
    assert main(scoring(world, run, 2, output)) == 0
    assert task_values(records[1]) == rows(output)


def test_an_evaluation_that_fails_ends_nothing(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(step_dir: Path) -> dict[str, float]:
        raise RuntimeError(f"no memory for {step_dir.name}")

    with caplog.at_level(logging.WARNING, logger="sparsecod"):
        run = trained(world, "failing", *evaluated(world), evaluate=broken)
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert "step 2: not evaluated; training continues" in caplog.messages
    assert "no memory for step_00000002" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.interval=2"], "evaluation.tasks: none, but evaluation.interval=2"),
        (
            ["evaluation.interval=2", "evaluation.tasks=[a]", "evaluation.include_path=nowhere"],
            "nowhere: no such folder",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(world: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(world, "refused", *overrides)
    assert not (world / "refused").exists()


@pytest.mark.dist
def test_two_processes_give_what_one_gives(world: Path) -> None:
    """A mixture over two ranks evaluated while it trains, and its checkpoint by two processes and by one.

    In whatever layout, what is evaluated is the checkpoint; test_export_layouts.py shows that all export alike.
    """
    run = world / "expert-parallel"
    experts = ["parallel.expert_model_parallel_size=2", "model.num_moe_experts=4", "model.moe_router_topk=2"]
    arguments = [*evaluated(world), *experts, f"logging.run_dir={run}"]
    sparsecod_ranks("train", world / "config.yaml", *arguments, "train.train_steps=2", nproc=2)
    one, two = world / "one", world / "two"
    assert main(scoring(world, run, 2, one)) == 0
    sparsecod_ranks(*scoring(world, run, 2, two), nproc=2)
    expected, shared = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert shared["tasks"] == expected["tasks"] and shared["perplexity"] == expected["perplexity"]
    assert expected["perplexity"]["num_windows"] > 16
    assert task_values(read_jsonl(run / "metrics.jsonl")[-1]) == rows(one)


def test_real_model_on_an_offline_set(
    shared_data: Path, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARC-Easy as docs/EVALUATION.md runs it, against choices scored by hand."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, limit = shared_data / "models" / "stories260K_hf", 8
    monkeypatch.chdir(shared_data / "eval")
    tasks = ["--include-path", str(repo_root / "examples" / "tasks"), "--tasks", "offline_arc"]
    arguments = ["--model", str(directory), "--limit", str(limit), "--device", "cpu", "--output", str(tmp_path)]
    assert main(["eval", *tasks, *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["tasks"]
    found = {row["metric"]: row["value"] for row in results if row["task"] == "arc_easy"}

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    right = {"acc": 0, "acc_norm": 0}
    data = Dataset.from_file("hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow")
    for question in data.select(range(limit)):
        context = f"Question: {question['question']}\nAnswer:"
        start, scores = len(tokenizer(context)["input_ids"]), []
        for choice in question["choices"]["text"]:
            ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(float(logs.gather(1, ids[0, start:, None]).sum()))
        lengths = [len(choice) for choice in question["choices"]["text"]]
        truth = question["choices"]["label"].index(question["answerKey"])
        right["acc"] += scores.index(max(scores)) == truth
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        right["acc_norm"] += normed.index(max(normed)) == truth
    assert found == {name: pytest.approx(number / limit) for name, number in right.items()}
