"""How directories come and go under RUN/checkpoints: by renaming, so that a reader finds a complete one or none.

`step_00000100` is committed; `step_00000100.tmp-1f2e` is being written or deleted; `step_00000100.old-1f2e` is being
replaced by a new checkpoint of the same step, and stays until that one is in its place.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsecod_megatron.checkpoint.manifest import write_manifest
from sparsecod_megatron.checkpoint.paths import point_latest_to, step_dirs

logger = logging.getLogger("sparsecod")

DIGESTS_PREFIX = ".digests-"
"""Start of the files in which each rank's writer leaves the digests of what it wrote."""


def new_directory(directory: Path) -> Path:
    """Create the temporary directory in which `directory` is to be written."""
    temporary = _beside(directory, "tmp")
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, directory: Path) -> None:
    """Turn what was written into the checkpoint `directory` and point `latest` at it. Local, on one rank.

    Raises:
        OSError: it could not be completed; nothing that was there before has changed.
    """
    write_manifest(temporary, _collect_digests(temporary))
    replaced = _beside(directory, "old")
    if directory.exists():
        directory.rename(replaced)
    temporary.rename(directory)
    point_latest_to(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what crashed or abandoned saves left, and put a checkpoint back that was about to be replaced."""
    for replaced in checkpoints.glob("step_*.old-*"):
        original = replaced.with_name(replaced.name.partition(".")[0])
        if original.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(original)
    for temporary in checkpoints.glob("step_*.tmp-*"):
        shutil.rmtree(temporary, ignore_errors=True)


def delete_superseded(
    checkpoints: Path, *, current: int, keep_last: int, keep_every: int, keep_steps: Sequence[int] = ()
) -> None:
    """Delete the checkpoints that are no longer kept, now that step `current` is committed and `latest` names it."""
    steps = step_dirs(checkpoints)
    for step in superseded(steps, current=current, keep_last=keep_last, keep_every=keep_every, keep_steps=keep_steps):
        trash = _beside(steps[step], "tmp")
        try:
            steps[step].rename(trash)
        except OSError as error:
            logger.warning("%s: cannot be deleted (%s)", steps[step], error.strerror)
            continue
        shutil.rmtree(trash, ignore_errors=True)


def superseded(
    steps: Iterable[int], *, current: int, keep_last: int, keep_every: int, keep_steps: Sequence[int] = ()
) -> list[int]:
    """Steps to delete: not among the newest `keep_last` up to `current`, nor multiples of `keep_every`, nor named.

    Steps after `current` belong to an attempt that is being redone; they neither count nor go.
    """
    earlier = sorted((step for step in steps if step < current), reverse=True)
    if keep_last == 0:
        return []
    kept = set(keep_steps)
    return [
        step for step in earlier[keep_last - 1 :] if not (keep_every and step % keep_every == 0) and step not in kept
    ]


def _beside(directory: Path, purpose: str) -> Path:
    # Not from Python's or torch's generators, whose state belongs to the run.
    return directory.with_name(f"{directory.name}.{purpose}-{secrets.token_hex(4)}")


def _collect_digests(temporary: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    for path in temporary.glob(DIGESTS_PREFIX + "*"):
        digests |= json.loads(path.read_text())
        path.unlink()
    # A writer that died after its data was there has hashed nothing; the data may still be short.
    for path in temporary.glob("*.distcp"):
        if path.name not in digests:
            raise OSError(f"{path.name} was not finished by its writer")
    return digests
