"""Where a branch comes from: the checkpoint it continues with another schedule, and the parents of that.

A run that decays from the middle of another's stable phase is that run up to there. Its own files begin with the step
after, so `lineage.json` says what came before, for the report and for whoever finds the folder later.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sparsecod_megatron.checkpoint.paths import resolve_step_dir, run_of, step_dirs
from sparsecod_megatron.checkpoint.state import read_state
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, LINEAGE_FILE
from sparsecod_megatron.errors import CheckpointError, ConfigError, DataError
from sparsecod_megatron.files import write_text

KEY = "checkpoint.branch_from"


@dataclass(frozen=True)
class Parent:
    """A run that another continues.

    Attributes:
        run: its directory, as an absolute path.
        step: last step that it shares with the branch.
        tokens: that counted in its loss up to there.
    """

    run: str
    step: int
    tokens: int


def parent_of(config: RunConfig) -> Path | None:
    """The step directory that a run branches from, absolute, named by `RUN`, `RUN@STEP` or itself; None without one.

    Raises:
        CheckpointError: no run there, it has no checkpoint of that step, or it has no optimizer to continue.
        ConfigError: this run ends at that step.
    """
    text = config.checkpoint.branch_from
    if text is None:
        return None
    run, at, step = text.rpartition("@")
    if at and step.isdecimal() and not Path(text).exists():
        steps = step_dirs(Path(run) / CHECKPOINTS_DIR)
        if int(step) not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{KEY}: {run} has no checkpoint of step {step} (it has {kept}); give one of these")
        source = steps[int(step)]
    else:
        source = resolve_step_dir(Path(text))
    state, train = read_state(source), config.train
    if state.train.step >= (last_step := train.exit_step or train.train_steps):
        raise ConfigError(
            f"{KEY}: {source} has done {state.train.step} steps, and this run ends at {last_step}; raise "
            "train.train_steps, or branch from an earlier step"
        )
    if state.is_weights_alone:
        raise CheckpointError(
            f"{KEY}: {source} holds weights without an optimizer, so there is nothing to continue; start from them "
            "with checkpoint.init_from"
        )
    return source.absolute()


def lineage_from(step_dir: Path) -> list[Parent]:
    """Parents of a branch that continues this step, the nearest first.

    Raises:
        DataError: the parent's own lineage cannot be read.
    """
    state, run = read_state(step_dir).train, run_of(step_dir)
    return [Parent(str(run), state.step, state.consumed_tokens), *read_lineage(run)]


def write_lineage(run_dir: Path, lineage: list[Parent]) -> None:
    """Write lineage.json."""
    parents = [dataclasses.asdict(parent) for parent in lineage]
    write_text(run_dir / LINEAGE_FILE, json.dumps({"parents": parents}, indent=1) + "\n")


def read_lineage(run_dir: Path) -> list[Parent]:
    """Parents of a run, the nearest first; none of one that began by itself.

    Raises:
        DataError: lineage.json is damaged.
    """
    path = run_dir / LINEAGE_FILE
    if not path.is_file():
        return []
    try:
        return [Parent(**parent) for parent in json.loads(path.read_text(encoding="utf-8"))["parents"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); delete it to do without") from None
