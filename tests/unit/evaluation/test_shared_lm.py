"""Requests dealt out to processes: the batches and the numbers of one process, and those of lm-eval's own model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

pytest.importorskip("lm_eval")
import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from sparsecod_megatron.evaluation.continuation_task import write_continuation_task  # noqa: E402
from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks  # noqa: E402
from sparsecod_megatron.parallel.processes import Processes  # noqa: E402

SEED, BATCH_SIZE = 3, 4


COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: '%s'}}
test_split: test
"""
TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: "{{text[:90]}}"
doc_to_choice: ["a", "b", "e", "the "]
doc_to_target: 2
target_delimiter: ""
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "generating": """
output_type: generate_until
doc_to_text: "{{text[:80]}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@dataclass(frozen=True)
class OneAfterAnother(Processes):
    """Shares of the work in this process, each after the one before."""

    num_shares: int = 1
    sizes: list[int] = field(default_factory=list)

    def distribute(self, parts: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        answers: list[Any] = [None] * len(parts)
        for share in range(self.num_shares):
            answers[share :: self.num_shares] = work(parts[share :: self.num_shares])
            self.sizes.append(len(parts[share :: self.num_shares]))
        return answers


@pytest.fixture
def tasks(tmp_path: Path, text: str) -> Path:
    """One task of each kind of request: choices (some of one token, which share a row), documents and generation."""
    folder = write_continuation_task(
        [text], tmp_path / "tasks", name="choices", num_questions=11, context_words=6, continuation_words=3
    )
    rows = [{"text": text[start : start + 400 + start // 9], "next": "e"} for start in range(0, 9000, 900)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + COMMON % data + task)
    return folder


NAMES = ["choices", "letters", "documents"]


def test_any_number_of_processes_gives_the_same_numbers(
    tasks: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    results = []
    for size in (1, 2, 3):
        loaded = load_tasks([*NAMES, "generating"], include_paths=[tasks], builtin=False)
        shares = OneAfterAnother(num_shares=size)
        results.append(run_tasks(model, tokenizer, loaded, batch_size=BATCH_SIZE, seed=SEED, processes=shares))
        assert len(shares.sizes) >= size and min(shares.sizes) > 0
    for result in results[1:]:
        assert result.answers == results[0].answers
        assert result.metrics == results[0].metrics
    assert {row.task for row in results[0].metrics} == {*NAMES, "generating"}


def test_numbers_are_those_of_lm_eval_itself(
    tasks: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded = load_tasks(NAMES, include_paths=[tasks], builtin=False)
    ours = run_tasks(
        model, tokenizer, loaded, batch_size=BATCH_SIZE, seed=SEED, processes=OneAfterAnother(num_shares=2)
    )
    again = load_tasks(NAMES, include_paths=[tasks], builtin=False)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
        tasks=again.tasks,
        task_manager=again.manager,
        **{f"{kind}_random_seed": SEED for kind in ("numpy", "torch", "fewshot")},
        random_seed=SEED,
        bootstrap_iters=1000,
    )
    assert theirs is not None
    for row in ours.metrics:
        expected = theirs["results"][row.task][f"{row.metric},none"]
        assert row.value == (pytest.approx(expected, rel=1e-6) if row.task == "documents" else expected)
    questions = {task: [sample["acc"] for sample in theirs["samples"][task]] for task in ("choices", "letters")}
    assert questions == {task: ours.answers[task, "acc"] for task in questions}


def test_prompts_that_lose_their_beginning_are_counted(
    tasks: Path, make_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    short = make_llama()
    short.config.max_position_embeddings = 16
    loaded = load_tasks(["letters"], include_paths=[tasks], builtin=False)
    result = run_tasks(short, tokenizer, loaded, batch_size=BATCH_SIZE)
    assert result.num_truncated == 40
