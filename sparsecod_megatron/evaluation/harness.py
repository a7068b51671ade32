"""lm-eval's tasks on a loaded model; the only file that imports lm_eval."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsecod_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Metrics without a formula for their error (F1, Matthews) are resampled; lm-eval's 100,000 draws take minutes a task.
BOOTSTRAP_DRAWS = 1000


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
    """All metrics, and lm-eval's own record (configurations, versions, few-shot counts) without the samples."""

    metrics: list[TaskMetric]
    record: dict[str, Any]


class LoadedTasks(NamedTuple):
    """Tasks and groups with their data, and the index they came from."""

    manager: TaskManager
    tasks: list[Task | Group]


def load_tasks(names: Sequence[str], *, include_paths: Sequence[Path] = (), builtin: bool = True) -> LoadedTasks:
    """Find tasks by name and load their data.

    Args:
        names: tasks, groups or tags.
        include_paths: folders with task YAMLs; they win over built-in tasks of the same name.
        builtin: also index lm-eval's own tasks, which takes seconds.

    Raises:
        ConfigError: lm-eval is not installed, a folder is missing, a name is unknown, or a task was named twice.
        DataError: a task's data are neither on disk nor to be had.
    """
    for folder in include_paths:
        if not folder.is_dir():
            raise ConfigError(f"--include-path {folder}: no such folder; give one with lm-eval task YAML files")
    try:
        from datasets.exceptions import DatasetsError
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        package = (error.name or "lm_eval").partition(".")[0]
        raise ConfigError(
            f'tasks need {package}, which is not installed: pip install "sparsecod_megatron[eval]"'
        ) from error
    manager = TaskManager(include_path=[str(folder) for folder in include_paths], include_defaults=builtin)
    for name in names:
        _check_name(name, manager)
    loaded: list[Task | Group] = []
    named_by: dict[str, str] = {}
    for name in names:
        try:
            found = manager.load([name])
        except (DatasetsError, OSError) as error:
            raise DataError(
                f"--tasks {name}: its data cannot be loaded ({error}); offline, use tasks whose data are local"
            ) from error
        for task in found["tasks"]:
            if task in named_by:
                raise ConfigError(f"--tasks: {task} is in both {named_by[task]} and {name}; name one of them")
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
) -> HarnessResult:
    """Evaluate tasks.

    Args:
        model: a causal LM on its device; its `max_position_embeddings` bounds the prompt.
        tokenizer: the model's.
        loaded: from `load_tasks`.
        limit: documents of each task; None scores all.
        batch_size: requests of a forward pass.
        seed: of few-shot sampling, bootstrap and generation.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _errors_only("lm_eval.models.huggingface"):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    record = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=loaded.tasks,
        task_manager=loaded.manager,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return HarnessResult(list(_metrics(record)), {"lm_eval_version": lm_eval.__version__, **record})


def _check_name(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        hint = f"near matches: {', '.join(near)}" if near else "give the folder of its YAML with --include-path"
        raise ConfigError(f"--tasks: unknown task {name!r}; {hint}")


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
                metric=metric if filter_name == "none" else f"{metric}/{filter_name}",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                num_samples=_num_samples(task, record),
            )


def _num_samples(task: str, record: dict[str, Any]) -> int:
    if task in record["n-samples"]:
        return int(record["n-samples"][task]["effective"])
    return sum(_num_samples(part, record) for part in record["group_subtasks"][task])


@contextmanager
def _errors_only(logger_name: str) -> Iterator[None]:
    """Keep one logger to errors: of every model in memory, lm-eval warns that its loading options do not apply."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
