"""A task as it is asked for, by `sparsecod analyze` or a study, and as items in a model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.analysis.scores.registry import ASKING, TAKING_TASKS
from sparsecod_megatron.analysis.tasks.built_in import BUILT_IN, make_pairs
from sparsecod_megatron.analysis.tasks.items import Items, items_of, without_task
from sparsecod_megatron.analysis.tasks.synthetic import SYNTHETIC, synthetic_items
from sparsecod_megatron.analysis.tasks.text import Pair, drawn, read_pairs, tokenised
from sparsecod_megatron.config import DataConfig
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskRequest:
    """Questions of one kind.

    Attributes:
        name: of `BUILT_IN`, `synthetic`, or a file of JSON lines.
        count: questions, at most.
        seed: of what is drawn.
        difficulties: those of a built-in task; empty is the task's own.
    """

    name: str
    count: int
    seed: int
    difficulties: tuple[int, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the questions are text, which any tokenizer reads."""
        return self.name != SYNTHETIC


def check_task(scores: Sequence[str], task: str | None, difficulties: Sequence[int]) -> None:
    """Refuse a task that no score asks, scores without their task, and difficulties of a task that has its own.

    Raises:
        ConfigError: any of these.
    """
    asking = [score for score in scores if score in ASKING]
    if task is not None and not set(scores) & set(TAKING_TASKS):
        raise ConfigError(
            f"--task {task}: no score asks it; leave it out, or add {' or '.join(TAKING_TASKS)} to --scores"
        )
    if task is None and asking:
        raise without_task(asking[0])
    if difficulties and task not in BUILT_IN:
        said = ",".join(map(str, difficulties))
        raise ConfigError(f"--difficulties {said}: only of --task {' and '.join(BUILT_IN)}; leave it out")


def read_questions(request: TaskRequest) -> list[Pair]:
    """The questions of a task of text.

    Raises:
        ConfigError: difficulties that the task has not, or fewer questions than difficulties.
        DataError: a file without questions.
    """
    if request.name in BUILT_IN:
        return make_pairs(request.name, request.difficulties, count=request.count, seed=request.seed)
    return drawn(read_pairs(Path(request.name)), request.count, seed=request.seed)


def make_items(
    request: TaskRequest,
    tokenizer: PreTrainedTokenizerBase,
    *,
    leading: int | None,
    vocab_size: int,
    data: DataConfig | None,
    model: str,
) -> Items:
    """The task's items in the model's tokens.

    Args:
        request: what is asked.
        tokenizer: the model's.
        leading: id that stands before a text; None leaves it out.
        vocab_size: the model's.
        data: of the run that the model is from; None where it is from none.
        model: how messages call it.

    Raises:
        ConfigError: `synthetic` of a model that is not a run on `data.synthetic`; difficulties that the task has not.
        DataError: a file without questions, or tokens that the model lacks.
    """
    if not request.is_text:
        task = None if data is None else task_of(data)
        if task is None or data is None:
            raise ConfigError(
                f"--task {SYNTHETIC}: {model} is not a run on data.synthetic; give such a run or step, or another task"
            )
        return synthetic_items(task, seq_length=data.seq_length, count=request.count, seed=request.seed)
    answered = tokenised(read_questions(request), tokenizer, leading=leading, name=request.name)
    return items_of(request.name, answered, vocab_size=vocab_size)
