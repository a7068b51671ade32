"""lm-eval as we call it: names, folders and data that are wrong get one line; groups count their parts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import sparsecod_megatron
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.evaluation.continuation_task import write_continuation_task
from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks


@pytest.fixture
def tasks(tmp_path: Path, text: str) -> Path:
    """Two tasks and a group of both."""
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    for name, num_questions in (("first", 9), ("second", 6)):
        write_continuation_task(
            [text], folder, name=name, num_questions=num_questions, context_words=6, continuation_words=3
        )
    group = {
        "group": "both",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


def test_group_is_the_mean_of_its_parts(
    tasks: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = run_tasks(model, tokenizer, load_tasks(["both"], include_paths=[tasks], builtin=False))
    accuracy = {metric.task: metric for metric in result.metrics if metric.metric == "acc"}
    assert {name: metric.num_samples for name, metric in accuracy.items()} == {"first": 9, "second": 6, "both": 15}
    assert accuracy["both"].value == pytest.approx((9 * accuracy["first"].value + 6 * accuracy["second"].value) / 15)
    for name in ("first", "second"):
        value, number = accuracy[name].value, accuracy[name].num_samples
        assert accuracy[name].stderr == pytest.approx((value * (1 - value) / (number - 1)) ** 0.5)


def test_limit(tasks: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tasks(["first"], include_paths=[tasks], builtin=False)
    result = run_tasks(model, tokenizer, loaded, limit=1)
    assert [(metric.num_samples, metric.stderr) for metric in result.metrics] == [(1, None)] * 2


def test_paper_stands_for_its_tasks(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'mmlu'"):
        load_tasks(["paper"], include_paths=[tasks], builtin=False)


def test_unknown_task_lists_near_matches(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'frist'; near matches: first"):
        load_tasks(["first", "frist"], include_paths=[tasks], builtin=False)
    with pytest.raises(ConfigError, match="unknown task 'zzz'; give the folder"):
        load_tasks(["zzz"], include_paths=[tasks], builtin=False)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no such folder"):
        load_tasks(["first"], include_paths=[tmp_path / "absent"], builtin=False)


def test_task_named_twice(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="'first' is in both both and first"):
        load_tasks(["both", "first"], include_paths=[tasks], builtin=False)


def test_task_without_its_data(tasks: Path) -> None:
    (tasks / "second.jsonl").unlink()
    with pytest.raises(
        DataError, match="task 'second': its data cannot be loaded.*run once where the hub can be reached"
    ):
        load_tasks(["first", "second"], include_paths=[tasks], builtin=False)


def test_absent_lm_eval_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=re.escape('lm_eval, which is not installed: pip install "sparsecod_megatron[eval]"')
    ):
        load_tasks(["anything"])


def test_no_other_files_import_lm_eval() -> None:
    package = Path(sparsecod_megatron.__file__).parent
    importing = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) lm_eval", path.read_text(), re.MULTILINE)
    ]
    assert sorted(importing) == ["harness.py", "shared_lm.py"]
