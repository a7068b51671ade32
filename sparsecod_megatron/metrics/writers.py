"""Where metrics go: JSON lines on disk always, Weights & Biases and TensorBoard when asked.

A line is written whole and flushed, so a crash loses at most the step in flight; a resumed run first drops what lies
after its step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.errors import ConfigError


class Writer(Protocol):
    """Takes one record a step; only rank 0 holds writers."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep `record`, which has `step`."""

    def close(self) -> None:
        """Flush and release."""


class JsonlWriter:
    """One JSON object a line.

    Args:
        path: file to append to; created if absent.
        last_step: lines of later steps are dropped first, as is a line that a crash left unfinished.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        _keep_until(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_until(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class WandbWriter:
    """A Weights & Biases run with flat keys: `loss`, `layer/07/out_var`.

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
        self._run = wandb.init(
            project=config.logging.wandb.project,
            name=config.logging.wandb.name or run_dir.name,
            dir=str(run_dir),
            mode=config.logging.wandb.mode,  # type: ignore[arg-type]
            config=dataclasses.asdict(config),
            resume="allow",
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one step under flat keys."""
        self._run.log(flat_values(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


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
