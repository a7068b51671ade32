"""Names inside RUN/checkpoints: one directory a step, and `latest`, which names the last complete one."""

from __future__ import annotations

from pathlib import Path

from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
from sparsecod_megatron.errors import CheckpointError

STATE_FILE = "state.json"
LATEST_FILE = "latest"


def step_dir_name(step: int) -> str:
    """Directory of one step's checkpoint."""
    return f"step_{step:08d}"


def latest_step_dir(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None if nothing was saved yet.

    Raises:
        CheckpointError: `latest` names a directory that is not there.
    """
    pointer = checkpoints / LATEST_FILE
    if not pointer.exists():
        return None
    directory = checkpoints / pointer.read_text().strip()
    if not (directory / STATE_FILE).exists():
        raise CheckpointError(
            f"{pointer}: names {directory.name}, which is not a complete checkpoint; write another step's name into it"
        )
    return directory


def point_latest_to(directory: Path) -> None:
    """Make `latest` name `directory`, atomically."""
    pointer = directory.parent / LATEST_FILE
    temporary = pointer.with_name(pointer.name + ".tmp")
    temporary.write_text(directory.name + "\n")
    temporary.replace(pointer)


def resolve_step_dir(path: Path) -> Path:
    """The step directory that a user means by a run, its checkpoints folder, or a step.

    Raises:
        CheckpointError: there is no checkpoint at or under `path`.
    """
    if (path / STATE_FILE).exists():
        return path
    for checkpoints in (path / CHECKPOINTS_DIR, path):
        directory = latest_step_dir(checkpoints)
        if directory is not None:
            return directory
    raise CheckpointError(
        f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_… directories"
    )
