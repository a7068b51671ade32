"""Names inside RUN/checkpoints: one directory per step, and `latest`, which names the one to resume from."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, TOKENIZER_DIR
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.files import write_text

STATE_FILE = "state.json"
METADATA_FILE = ".metadata"
"""Where torch's writer says which tensor lies where."""
LATEST_FILE = "latest"
_STEP = re.compile(r"step_(\d{8,})")

logger = logging.getLogger("sparsecod")


def step_dir_name(step: int) -> str:
    """Directory of one step's checkpoint."""
    return f"step_{step:08d}"


def step_dirs(checkpoints: Path) -> dict[int, Path]:
    """Committed checkpoints by step, ascending; whatever state they are in."""
    if not checkpoints.is_dir():
        return {}
    found = {int(match[1]): path for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def resume_candidates(checkpoints: Path) -> list[Path]:
    """Where a run may resume from: what `latest` names, then the steps before it, newest first.

    Where `latest` is absent or names nothing that is there, all steps are. Later ones than it names belong to an
    attempt that is being redone.

    Raises:
        CheckpointError: something was saved and is gone.
    """
    steps, pointer = step_dirs(checkpoints), checkpoints / LATEST_FILE
    if not pointer.exists():
        return [steps[step] for step in reversed(steps)]
    named = pointer.read_text(errors="replace").strip()[:40]
    match = _STEP.fullmatch(named)
    usable = [steps[step] for step in reversed(steps) if match is None or step <= int(match[1])]
    if not usable:
        raise CheckpointError(
            f"{pointer}: names {named!r}, and neither it nor an earlier checkpoint is there; "
            "write another step's name into it, or start afresh in another logging.run_dir"
        )
    if usable[0].name != named:
        logger.warning("%s names %r, which is not there; the newest before it is %s", pointer, named, usable[0].name)
    return usable


def point_latest_to(directory: Path) -> None:
    """Make `latest` name `directory`, atomically and durably."""
    write_text(directory.parent / LATEST_FILE, directory.name + "\n", durable=True)


def resolve_step_dir(path: Path) -> Path:
    """The step directory that a user means by a run, its checkpoints folder, or a step.

    Raises:
        CheckpointError: there is no checkpoint at or under `path`.
    """
    if (path / STATE_FILE).exists():
        return path
    for checkpoints in (path / CHECKPOINTS_DIR, path):
        if candidates := resume_candidates(checkpoints):
            return candidates[0]
    raise CheckpointError(
        f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_… directories"
    )


def run_of(step_dir: Path) -> Path:
    """The run directory that a step directory belongs to."""
    return step_dir.parent.parent


def tokenizer_dir(step_dir: Path) -> Path | None:
    """HuggingFace tokenizer of the run that a step directory belongs to, or None if it has none."""
    folder = run_of(step_dir) / TOKENIZER_DIR
    return folder if folder.is_dir() else None
