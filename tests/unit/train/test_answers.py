"""Right answers and bits: counted as a naive reader would, learned where there is a table, resumed exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.data.synthetic.biographies import Biographies
from sparsecod_megatron.data.synthetic.memorization import Memorization
from sparsecod_megatron.data.synthetic.recall import Recall
from sparsecod_megatron.data.synthetic.task import Draw, Task
from tests.helpers.megatron import SMALL
from tests.helpers.training import small_trainer

PEOPLE = Biographies(num_people=6, name_choices=[3, 4, 5], value_choices=[3, 4, 5, 2, 6, 3, 4, 5], num_templates=2)


def batch_of(task: Task, length: int, count: int = 16) -> dict[str, torch.Tensor]:
    samples = [task.make(Draw(1, number, held_out=True), length) for number in range(count)]
    return {
        "labels": torch.from_numpy(np.stack([sample.labels for sample in samples])),
        "loss_mask": torch.from_numpy(np.stack([sample.is_answer for sample in samples])).float(),
    }


@pytest.mark.parametrize(("task", "length"), [(Recall(), 32), (Memorization(vocab_size=32), 16), (PEOPLE, 80)])
def test_oracle_constant_and_any_other_logits(task: Task, length: int) -> None:
    """An oracle scores 1.0 and a table's bits, a constant its one id's share, others what is counted here."""
    with small_trainer() as trainer:
        from sparsecod_megatron.train.answers import answer_metrics, answer_sums, class_numbers

        batch, size = batch_of(task, length), len(task.vocabulary())
        classes = task.classes()

        def metrics(logits: torch.Tensor) -> dict[str, float]:
            numbers = torch.from_numpy(class_numbers(task))
            sums = answer_sums(batch, logits, class_of=numbers, count=len(classes), tp_group=trainer.groups.tp)
            return answer_metrics(task, sums.view(len(classes), 3).numpy(), parameters=50)

        oracle = metrics(100.0 * torch.nn.functional.one_hot(batch["labels"], size))
        constant = metrics(torch.zeros(*batch["labels"].shape, size))
        logits = torch.randn(*batch["labels"].shape, size, generator=torch.Generator().manual_seed(0))
        random = metrics(logits)
    places = batch["loss_mask"].bool()
    assert oracle["answer_accuracy"] == 1.0 and oracle["validation_loss"] == pytest.approx(0, abs=1e-12)
    assert constant["answer_accuracy"] == float((batch["labels"][places] == 0).double().mean())
    assert constant["validation_loss"] == pytest.approx(math.log(size))
    losses = torch.nn.functional.cross_entropy(logits[places].double(), batch["labels"][places], reduction="none")
    assert random["validation_loss"] == pytest.approx(losses.mean().item())
    asked = torch.isin(batch["labels"][places], torch.from_numpy(list(classes.values())[-1]))
    right = logits[places].argmax(-1) == batch["labels"][places]
    assert random["answer_accuracy"] == pytest.approx(right[asked].double().mean().item())
    if (knowledge := task.knowledge()) is not None:
        if len(classes) == 1:
            assert oracle["knowledge_bits"] == pytest.approx(knowledge.most_bits())
        assert oracle["most_bits_per_parameter"] == pytest.approx(knowledge.most_bits() / 50)
        assert random["bits_per_parameter"] == pytest.approx(random["knowledge_bits"] / 50)


def run_directory(path: Path, *overrides: str) -> Path:
    """A run in this process on a table of 15 keys."""
    settings = (
        *SMALL,
        "model.vocab_size=null",  # the task's own
        "model.num_layers=1",
        "data.synthetic.task=memorization",
        "data.synthetic.vocab_size=32",
        "data.synthetic.num_samples=40",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "optimizer.lr=1e-2",
        "train.train_steps=60",
        "train.eval_interval=30",
        "train.eval_steps=4",
        "checkpoint.save_interval=30",
        f"logging.run_dir={path}",
    )
    backend = select_backend()
    from sparsecod_megatron.train.loop import run_training

    run_training(load_config(None, [*settings, *overrides]), backend)
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for key in ("tokens_per_s", "tflops", "step_time_s"):
            del record[key]
    return records


def test_a_table_is_learned_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """All of its bits are known in the end; stopping half-way changes no number; a study finds its metrics."""
    straight = run_directory(tmp_path / "straight")
    half, last = (record for record in lines(straight) if "answer_accuracy" in record)
    assert half["answer_accuracy"] < last["answer_accuracy"] == 1.0
    assert 0.85 * 15 * 4 < last["knowledge_bits"] <= 15 * 4
    assert last["bits_per_parameter"] / last["most_bits_per_parameter"] == pytest.approx(last["knowledge_bits"] / 60)
    assert last["tokens"] == 60 * 8 * 16
    stopped = run_directory(tmp_path / "stopped", "train.exit_step=30")
    run_directory(stopped)
    assert lines(stopped) == lines(straight)

    from transformers import AutoTokenizer

    from sparsecod_megatron.studies.metrics import cell_metrics

    assert AutoTokenizer.from_pretrained(straight / "tokenizer").convert_ids_to_tokens(31) == "insert"
    nothing = tmp_path / "nothing"
    found = cell_metrics(load_config(straight / "config.yaml"), run=straight, analysis=nothing, evaluation=nothing)
    assert found["answer_accuracy"] == 1.0 and found["knowledge_bits"] == last["knowledge_bits"]
