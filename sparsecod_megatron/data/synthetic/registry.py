"""The synthetic tasks that there are, and `data.synthetic` as one of them."""

from __future__ import annotations

import dataclasses
import difflib

from sparsecod_megatron.config import DataConfig
from sparsecod_megatron.config.fields import bound_problems
from sparsecod_megatron.config.typed import Update, merge_typed
from sparsecod_megatron.data.synthetic.biographies import Biographies
from sparsecod_megatron.data.synthetic.fuzzy_recall import FuzzyRecall
from sparsecod_megatron.data.synthetic.memorization import Memorization
from sparsecod_megatron.data.synthetic.noisy_recall import NoisyRecall
from sparsecod_megatron.data.synthetic.recall import Recall
from sparsecod_megatron.data.synthetic.selective_copying import SelectiveCopying
from sparsecod_megatron.data.synthetic.task import Task
from sparsecod_megatron.errors import ConfigError

SECTION = "data.synthetic"
TASKS: dict[str, type[Task]] = {
    "recall": Recall,
    "fuzzy_recall": FuzzyRecall,
    "noisy_recall": NoisyRecall,
    "selective_copying": SelectiveCopying,
    "memorization": Memorization,
    "biographies": Biographies,
}


def task_of(data: DataConfig) -> Task | None:
    """The task that the section names, with its settings; None where the run reads token files.

    A setting that is null is not set, so that an override can take back what a file says for another task.

    Raises:
        ConfigError: no such task, a setting that it has not, of the wrong type, or that cannot be.
    """
    settings = {key: value for key, value in data.synthetic.items() if value is not None}
    if not settings:
        return None
    if "task" not in settings:
        raise ConfigError(f"{SECTION}.task: not set; choose one of {', '.join(TASKS)}")
    name = settings.pop("task")
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}"
        raise ConfigError(f"{SECTION}.task: {name!r} is not a task; {hint}")
    known = [item.name for item in dataclasses.fields(TASKS[name])]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{SECTION}.{key}: {name} has no such setting; it has {', '.join(known)}")
    task = merge_typed(TASKS[name], [Update(SECTION, settings)])
    for problem in (*bound_problems(task, f"{SECTION}."), *task.problems(data.seq_length)):
        raise ConfigError(problem)
    return task
