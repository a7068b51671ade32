"""The continuation task: its questions are right by construction, and a model that knows the text answers them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsecod_megatron.errors import DataError
from sparsecod_megatron.evaluation.continuation_task import write_continuation_task
from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks


def unique_words(num_documents: int, num_words: int) -> list[str]:
    # Fixed width: no word is the beginning of another, so `in` finds whole words only.
    return [" ".join(f"d{document}w{word:04}" for word in range(num_words)) for document in range(num_documents)]


def questions(folder: Path, name: str = "true_continuation") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@settings(max_examples=25, deadline=None)
@given(
    num_documents=st.integers(1, 6),
    context_words=st.integers(1, 9),
    continuation_words=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_only_the_true_choice_follows_the_context(
    tmp_path_factory: pytest.TempPathFactory, num_documents: int, context_words: int, continuation_words: int, seed: int
) -> None:
    documents = unique_words(num_documents, 200)
    folder = write_continuation_task(
        documents,
        tmp_path_factory.mktemp("task"),
        num_questions=10,
        context_words=context_words,
        continuation_words=continuation_words,
        seed=seed,
    )
    rows = questions(folder)
    assert len({row["context"] for row in rows}) == 10
    for row in rows:
        assert len(row["context"].split()) == context_words
        assert [len(choice.split()) for choice in row["choices"]] == [continuation_words] * 4
        assert len(set(row["choices"])) == 4
        source = next(document for document in documents if row["context"] in document)
        follows = [f"{row['context']} {choice}" in source for choice in row["choices"]]
        assert follows == [place == row["label"] for place in range(4)]
        from_same = [choice in source for choice in row["choices"]]
        assert sum(from_same) == (1 if num_documents > 1 else 4)


def test_spacing_inside_a_passage_is_kept(tmp_path: Path) -> None:
    text = "\n\n".join(f"line  {number}:\tα" for number in range(50))
    rows = questions(write_continuation_task([text], tmp_path, num_questions=4, context_words=6, continuation_words=3))
    for row in rows:
        assert row["context"] in text and row["choices"][row["label"]] in text
        assert "\n\n" in row["context"]


def test_places_are_balanced_and_seeded(tmp_path: Path) -> None:
    documents = unique_words(3, 3000)

    def rows(folder: str, seed: int) -> list[dict]:
        return questions(
            write_continuation_task(
                documents, tmp_path / folder, context_words=8, continuation_words=4, num_questions=400, seed=seed
            )
        )

    first = rows("a", 1)
    assert all(70 <= count <= 130 for count in Counter(row["label"] for row in first).values())
    assert rows("b", 1) == first
    assert rows("c", 2) != first


def test_task_file_points_at_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_continuation_task(unique_words(2, 500), Path("run/tasks"), name="mine", num_questions=5)
    task = yaml.safe_load((folder / "mine.yaml").read_text(encoding="utf-8"))
    assert task["task"] == "mine"
    assert Path(task["dataset_kwargs"]["data_files"]["test"]) == tmp_path / "run/tasks/mine.jsonl"
    assert [metric["metric"] for metric in task["metric_list"]] == ["acc", "acc_norm"]
    assert sorted(path.name for path in folder.iterdir()) == ["mine.jsonl", "mine.yaml"]


def test_too_little_or_too_uniform_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 3 passages of 64 words, 100 questions need 100"):
        write_continuation_task(unique_words(1, 200), tmp_path)
    with pytest.raises(DataError, match="1 questions need 4"):
        write_continuation_task(unique_words(1, 200), tmp_path, num_questions=1)
    with pytest.raises(DataError, match="repeats itself"):
        write_continuation_task(["same " * 1000], tmp_path, num_questions=5)
    assert not list(tmp_path.iterdir())


def cycle_model(make_llama: Callable[..., LlamaForCausalLM], num_words: int, *, step: int) -> LlamaForCausalLM:
    """A Llama that predicts word `w + step` after `w`: one-hot embeddings pass through blocks that add nothing."""
    model = make_llama(num_words, hidden_size=num_words, intermediate_size=8, num_attention_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(num_words))
        model.lm_head.weight.copy_(torch.roll(torch.eye(num_words), step, dims=0))
    return model


@pytest.mark.parametrize(("step", "accuracy"), [(1, 1.0), (-1, None)])
def test_planted_model_scores_what_it_knows(
    tmp_path: Path, make_llama: Callable[..., LlamaForCausalLM], step: int, accuracy: float | None
) -> None:
    pytest.importorskip("lm_eval")
    num_words = 60
    words = [f"w{number}" for number in range(num_words)]
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="w0", pad_token="w0")
    folder = write_continuation_task(
        [" ".join(words * 30)], tmp_path / "tasks", context_words=7, continuation_words=4, num_questions=40
    )
    loaded = load_tasks(["true_continuation"], include_paths=[folder], builtin=False)
    result = run_tasks(cycle_model(make_llama, num_words, step=step), tokenizer, loaded, batch_size=16)
    metrics = {metric.metric: metric for metric in result.metrics}
    assert set(metrics) == {"acc", "acc_norm"}
    for metric in metrics.values():
        assert (metric.task, metric.num_samples) == ("true_continuation", 40)
        if accuracy is None:
            assert metric.value < 0.6  # the wrong direction knows nothing of what follows
        else:
            assert (metric.value, metric.stderr) == (accuracy, 0.0)
