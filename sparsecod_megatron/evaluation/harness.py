"""lm-eval's tasks on a loaded model: found by name, run, and their results as flat rows."""

from __future__ import annotations

import difflib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.evaluation.paper_tasks import PAPER, PAPER_TASKS
from sparsecod_megatron.parallel.processes import Processes

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Metrics without a formula for their error (F1, Matthews) are resampled; lm-eval's 100,000 draws take minutes a task.
BOOTSTRAP_DRAWS = 1000
POOL_SWITCH = "DISABLE_MULTIPROC"
"""Names, in the environment, what keeps lm-eval's resampling in its process."""


@dataclass(frozen=True)
class TaskMetric:
    """One number of one task or group.

    Attributes:
        task: its lm-eval name.
        metric: lm-eval's name, with the filter appended (`exact_match/strict-match`) where it is not `none`.
        value: as lm-eval aggregates it.
        stderr: standard error, or None where lm-eval gives none.
        num_samples: documents scored, over all sub-tasks of a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int


@dataclass(frozen=True)
class HarnessResult:
    """All tasks of one model.

    Attributes:
        metrics: metrics of every task and group.
        record: lm-eval's own (configurations, versions, few-shot counts) without the samples.
        num_truncated: requests whose prompt lost its beginning, because the model takes no more tokens.
        answers: each question's value by (task, metric), in the order of the data; what lm-eval averages, or resamples.
    """

    metrics: list[TaskMetric]
    record: dict[str, Any]
    num_truncated: int = 0
    answers: dict[tuple[str, str], list[float]] = field(default_factory=dict)


class LoadedTasks(NamedTuple):
    """Tasks and groups with their data, and the index they came from."""

    manager: TaskManager
    tasks: list[Task | Group]


def load_tasks(names: Sequence[str], *, include_paths: Sequence[Path] = (), builtin: bool = True) -> LoadedTasks:
    """Find tasks by name and load their data.

    Args:
        names: tasks, groups or tags; `paper` stands for the paper's tasks.
        include_paths: folders with task YAMLs; they win over built-in tasks of the same name.
        builtin: lm-eval's own tasks too. Indexing them takes seconds, and is left out where all names are tasks of the
            folders.

    Raises:
        ConfigError: lm-eval is not installed, a folder is missing, a name is unknown, or a task was named twice.
        DataError: a task's data are neither on disk nor to be had.
    """
    for folder in include_paths:
        if not folder.is_dir():
            raise ConfigError(f"include path {folder}: no such folder; give one with lm-eval task YAML files")
    try:
        import lm_eval.tasks  # noqa: F401
    except ModuleNotFoundError as error:
        package = (error.name or "lm_eval").partition(".")[0]
        raise ConfigError(
            f'tasks need {package}, which is not installed: pip install "sparsecod_megatron[eval]"'
        ) from error
    names = [part for name in names for part in (PAPER_TASKS if name == PAPER else (name,))]
    loaded: list[Task | Group] = []
    named_by: dict[str, str] = {}
    with _quietly():
        manager = _index(names, list(map(str, include_paths)), builtin=builtin)
        for name in names:
            _check_name(name, manager)
        for name in names:
            found = _load(name, manager)
            for task in found["tasks"]:
                if task in named_by:
                    raise ConfigError(f"task {task!r} is in both {named_by[task]} and {name}; name one of them")
                named_by[task] = name
            groups = found.get("groups", {})
            loaded.extend([groups[name]] if name in groups else found["tasks"].values())
    return LoadedTasks(manager, loaded)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    processes: Processes | None = None,
    progress: bool = False,
) -> HarnessResult:
    """Evaluate tasks. Collective over the processes, each of which gets the whole result.

    Args:
        model: a causal LM on its device; its `max_position_embeddings` bounds the prompt.
        tokenizer: the model's.
        loaded: from `load_tasks`.
        limit: documents of each task; None scores all.
        batch_size: requests of a forward pass.
        seed: seed of few-shot sampling, bootstrap and generation.
        processes: those that share the work; None is this one alone. Their number does not change the result.
        progress: show lm-eval's bars.
    """
    import lm_eval
    from lm_eval.evaluator import evaluate

    from sparsecod_megatron.evaluation.shared_lm import SharedLM

    found = loaded.manager.load(loaded.tasks)
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with _quietly():
        shared = SharedLM(
            model, tokenizer, batch_size=batch_size, processes=processes or Processes(), progress=progress
        )
        record = evaluate(shared, found, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS)
    answers = dict(_answers(record.pop("samples")))
    record = {"lm_eval_version": lm_eval.__version__, **record}
    return HarnessResult(list(_metrics(record)), record, shared.num_truncated, answers)


def _index(names: Sequence[str], folders: list[str], *, builtin: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=folders, include_defaults=False).task_index
    # A group may hold built-in tasks.
    needed = any(name not in found or found[name].kind.name != "TASK" for name in names)
    return TaskManager(include_path=folders, include_defaults=builtin and needed)


def _check_name(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        hint = f"near matches: {', '.join(near)}" if near else "give the folder of its YAML (include path)"
        raise ConfigError(f"unknown task {name!r}; {hint}")


def _load(name: str, manager: TaskManager) -> TaskDict:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([name])
    except (DatasetsError, OSError) as error:
        raise DataError(
            f"task {name!r}: its data cannot be loaded ({error}); run once where the hub can be reached, which fills "
            "the cache, or name tasks over local files (docs/EVALUATION.md)"
        ) from error


def _metrics(record: dict[str, Any]) -> Iterator[TaskMetric]:
    """Flatten lm-eval's `{"acc,none": value, "acc_stderr,none": error, …}` of every task and group."""
    for task, values in record["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            yield TaskMetric(
                task=task,
                metric=_metric_name(metric, filter_name),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                num_samples=_num_samples(task, record),
            )


def _num_samples(task: str, record: dict[str, Any]) -> int:
    if task in record["n-samples"]:
        return int(record["n-samples"][task]["effective"])
    return sum(_num_samples(part, record) for part in record["group_subtasks"][task])


def _answers(samples: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[tuple[str, str], list[float]]]:
    """Values of single questions by task and metric, where they are numbers."""
    for task, questions in samples.items():
        values: dict[str, list[float]] = {}
        for question in sorted(questions, key=lambda question: question["doc_id"]):
            for metric in question["metrics"]:
                if isinstance(question[metric], (int, float, np.number)):
                    values.setdefault(_metric_name(metric, question["filter"]), []).append(float(question[metric]))
        yield from (((task, metric), of_metric) for metric, of_metric in values.items())


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}/{filter_name}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep lm-eval to errors, and to this process while it resamples.

    It tells of every default it takes, of every prompt that is too long, and on stdout of what it resamples. Its pool
    would copy a process that may be training, signal handlers and all.
    """
    logger = logging.getLogger("lm_eval")
    level, pool = logger.level, os.environ.get(POOL_SWITCH)
    logger.setLevel(logging.ERROR)
    os.environ[POOL_SWITCH] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if pool is None:
            del os.environ[POOL_SWITCH]
        else:
            os.environ[POOL_SWITCH] = pool
