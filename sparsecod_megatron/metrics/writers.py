"""Where metrics go: always JSON lines on disk, Weights & Biases and TensorBoard on request.

A line is written whole, so a crash loses at most the step in flight; a resumed run first drops what lies after its
step. No failure to write ends the run: lines wait until the disk takes them, and a tracker that fails is let go.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import write_text

logger = logging.getLogger("sparsecod")

WANDB_ID_FILE = "wandb_run_id"
"""In RUN: the identity under which every attempt of the run continues one run of Weights & Biases."""
WANDB_PATIENCE_S = 60.0
"""How long a start waits for the server before the run is kept offline."""


class Writer(Protocol):
    """Takes one record a step; only rank 0 holds writers."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep `record`, which has `step`."""

    def close(self) -> None:
        """Flush and release."""


class JsonlWriter:
    """One JSON object per line. What a full disk refuses is kept and written, in order, once it can be.

    Args:
        path: file to append to; created if absent.
        last_step: lines of later steps are dropped first, as is a line that a crash left unfinished.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        _keep_until(path, last_step)
        # Unbuffered, so that what is refused is in our hands and not in a buffer that fails again when closed.
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, and any that waited."""
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                logger.warning("%s: cannot be written (%s); its lines are kept until it can", self._file.name, error)
                self._warned = True

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            logger.warning("%s: %d lines could not be written", self._file.name, self._waiting.count(b"\n"))
        self._file.close()


class TrackerWriter:
    """A tracker that may fail: its first error is logged, and nothing is sent to it after that.

    Args:
        tracker: the writer that takes the records.
        name: name of the tracker, for the log.
    """

    def __init__(self, tracker: Writer, name: str) -> None:
        self._tracker, self._name = tracker, name
        self._works = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass on one record."""
        self._try(lambda: self._tracker.write(record))

    def close(self) -> None:
        """Flush and release."""
        self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:  # whatever a client library raises: the run is worth more than its curves
            self._works = False
            logger.warning("%s fails (%s: %s) and gets no more metrics", self._name, type(error).__name__, error)


def _keep_until(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    write_text(path, "".join(kept))


class WandbWriter:
    """A Weights & Biases run with flat keys: `loss`, `layer/07/out_var`. Kept offline if the server cannot be reached.

    Args:
        config: names the project and is kept as the run's configuration.
        run_dir: where wandb keeps its files; `mode: offline` needs nothing else.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"logging.wandb.mode: {config.logging.wandb.mode!r} needs wandb, which is not installed; "
                'pip install "sparsecod_megatron[wandb]" or set it to disabled'
            ) from None
        import dataclasses

        os.environ.setdefault("WANDB_SILENT", "true")
        section = config.logging.wandb
        start = partial(
            wandb.init,
            project=section.project,
            name=section.name or run_dir.name,
            id=_wandb_id(run_dir),
            dir=str(run_dir),
            config=dataclasses.asdict(config),
            resume="allow",
            settings=wandb.Settings(init_timeout=WANDB_PATIENCE_S),
        )
        try:
            self._run = start(mode=section.mode)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            if section.mode == "offline":
                raise
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "Weights & Biases cannot be used (%s); kept offline in %s, `wandb sync` uploads it later",
                *(reason, run_dir / "wandb"),
            )
            wandb.teardown()  # its service would take the identity for one in use
            self._run = start(mode="offline")

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one step under flat keys."""
        self._run.log(flat_values(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    """The identity kept in RUN, or a new one, kept from now on."""
    path = run_dir / WANDB_ID_FILE
    if path.exists():
        return path.read_text().strip()
    write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


class TensorBoardWriter:
    """TensorBoard event files with the same flat keys.

    Args:
        run_dir: events go to its `tensorboard` folder.
        last_step: events of later steps, from an attempt that is being redone, are hidden.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logging.tensorboard: true needs tensorboard, which is not installed; "
                'pip install "sparsecod_megatron[tensorboard]" or set it to false'
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one step under flat keys."""
        for name, value in flat_values(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def flat_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of a record by one key each: `loss`, `layer/07/out_var`, `layer/07/tokens_per_expert/3`."""
    values = {key: value for key, value in record.items() if key not in ("step", "layers")}
    for layer in record.get("layers", []):
        for name, value in layer.items():
            key = f"layer/{layer['layer']:02d}/{name}"
            if isinstance(value, list):
                values |= {f"{key}/{index}": item for index, item in enumerate(value)}
            elif name != "layer":
                values[key] = value
    return values
