"""What a cell's scores and evaluation would refuse once it has trained, refused before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.errors import ConfigError, SparsecodError
from sparsecod_megatron.seams.mechanism import configured
from sparsecod_megatron.studies.schema import ScoresConfig, StudyConfig
from sparsecod_megatron.studies.scoring import requested_task

KEYS = {
    "--scores": "scores.names",
    "--task": "scores.task",
    "--difficulties": "scores.difficulties",
    "--samples": "scores.samples",
}
"""Option of `sparsecod analyze` → the key that says the same in a study."""


class NamedRun(NamedTuple):
    """A cell as these checks see it: its name and its run."""

    name: str
    config: RunConfig


def check_cells(path: Path, study: StudyConfig, cells: Sequence[NamedRun]) -> None:
    """Refuse scores, tasks and cells that do not go together.

    Args:
        path: the study's file, for messages.
        study: what it says.
        cells: every cell.

    Raises:
        ConfigError: one line about the first problem, with the cell where it is one cell's.
    """
    try:
        _check_names(study.scores)
    except SparsecodError as error:
        raise ConfigError(f"{path}: {_in_keys(error)}") from None
    asked: dict[tuple[str, int], None] = {}
    for cell in cells:
        for problem in _problems(study, cell):
            raise ConfigError(f"{path}: {problem}")
        place = (str(cell.config.data.tokenizer), cell.config.data.seq_length)
        if place not in asked:
            _check_questions(path, study.scores, cell)
            asked[place] = None


def _check_names(settings: ScoresConfig) -> None:
    """Scores that there are not, and a task that does not go with them or cannot be read."""
    if not settings.names:
        if settings.task is not None:
            raise ConfigError(f"scores.task: {settings.task}, but scores.names is []; leave it out, or name a score")
        return
    from sparsecod_megatron.analysis.scores.registry import find_scores
    from sparsecod_megatron.analysis.tasks.request import read_questions

    find_scores(settings.names)
    request = requested_task(settings)
    if request is not None and request.is_text:
        read_questions(request)


def _problems(study: StudyConfig, cell: NamedRun) -> Iterator[str]:
    from sparsecod_megatron.analysis.scores.registry import ASKING
    from sparsecod_megatron.analysis.tasks.synthetic import SYNTHETIC

    scores, data = study.scores, cell.config.data
    of_text = [name for name in scores.names if name not in ASKING]
    if data.synthetic:
        yield from _synthetic_problems(study, cell, of_text)
    elif scores.task == SYNTHETIC:
        yield (
            f"scores.task: {SYNTHETIC}, but cell {cell.name} does not train on data.synthetic; give a task of text, or "
            "let all cells train on a synthetic one"
        )
    if of_text and scores.seq_length > data.seq_length:
        yield (
            f"scores.seq_length: {scores.seq_length} is above data.seq_length={data.seq_length} of cell {cell.name}, "
            "whose model takes no more; lower it"
        )
    for mechanism in configured(cell.config):
        if "jacobian" in scores.names and mechanism.mixes_tokens:
            yield (
                f"scores.names: jacobian cannot be computed of cell {cell.name}, because mechanisms.{mechanism.name} "
                "mixes tokens outside of attention; leave jacobian out"
            )


def _synthetic_problems(study: StudyConfig, cell: NamedRun, of_text: Sequence[str]) -> Iterator[str]:
    """What needs text, which a synthetic task has none of, and a run that would say nothing of its answers."""
    from sparsecod_megatron.analysis.tasks.synthetic import SYNTHETIC

    where = f"cell {cell.name} trains on data.synthetic"
    if of_text:
        yield f"scores.names: {', '.join(of_text)} need text, and {where}; leave them out, or set names to []"
    if study.evaluation.tasks:
        yield f"evaluation.tasks: {', '.join(study.evaluation.tasks)} need text, and {where}; set it to []"
    if study.scores.task not in (None, SYNTHETIC):
        yield f"scores.task: {study.scores.task} is text, and {where}; set it to {SYNTHETIC}"
    if cell.config.train.eval_interval == 0:
        yield (
            f"train.eval_interval: 0, but the numbers of cell {cell.name} on data.synthetic come from validation; set "
            "an interval"
        )


def _check_questions(path: Path, settings: ScoresConfig, cell: NamedRun) -> None:
    """Refuse questions that are longer than the cell's sequences, as far as its tokenizer is there already."""
    request, data = requested_task(settings), cell.config.data
    if request is None or not request.is_text or data.tokenizer is None or not Path(data.tokenizer).exists():
        return
    from sparsecod_megatron.analysis.tasks.request import make_items
    from sparsecod_megatron.data.tokenizer import load_tokenizer
    from sparsecod_megatron.evaluation.corpus import leading_token

    try:
        tokenizer = load_tokenizer(data.tokenizer)
        leading = leading_token(tokenizer)
        items = make_items(
            request, tokenizer, leading=leading, vocab_size=len(tokenizer), data=data, model=f"cell {cell.name}"
        )
    except SparsecodError as error:
        raise ConfigError(f"{path}: {_in_keys(error)}") from None
    if (length := items.tokens.shape[1]) > data.seq_length:
        raise ConfigError(
            f"{path}: scores.task: {request.name} has questions of {length} tokens, above data.seq_length="
            f"{data.seq_length} of cell {cell.name}, whose model takes no more; give longer sequences or another task"
        )


def _in_keys(error: SparsecodError) -> str:
    """What `sparsecod analyze` says of its options, said of the study's keys."""
    said = str(error)
    for option, key in KEYS.items():
        said = said.replace(option, key)
    return said
