"""The run directory: resolved configuration, tokenizer, metrics, statistics, checkpoints and log of one run."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecod_megatron.backend import choice
from sparsecod_megatron.checkpoint.lineage import lineage_from, write_lineage
from sparsecod_megatron.config import RunConfig, load_config, save_config
from sparsecod_megatron.config.run_files import (
    CONFIG_FILE,
    LOG_FILE,
    METRICS_FILE,
    STATISTICS_FILE,
    TOKENIZER_DIR,
    VERSIONS_FILE,
)
from sparsecod_megatron.config.versions import installed_versions, recorded_versions
from sparsecod_megatron.data.synthetic.dataset import task_tokenizer
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import making
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS
from sparsecod_megatron.metrics import Statistics
from sparsecod_megatron.metrics.writers import JsonlWriter, TensorBoardWriter, TrackerWriter, WandbWriter, Writer

logger = logging.getLogger("sparsecod")


class RunDirectory:
    """Files that rank 0 writes during a run.

    Args:
        path: RUN.
        config: resolved, kept as config.yaml.
        last_step: step the run starts after; later lines of an earlier attempt are dropped.
        products: the trainer's, kept in versions.jsonl.
        parent: step directory that the run branches from as it starts, kept in lineage.json.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        *,
        last_step: int,
        products: dict[str, Any] | None = None,
        parent: Path | None = None,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        trackers: list[Writer] = []  # the first, because they may refuse
        if config.logging.wandb.mode != "disabled":
            trackers.append(TrackerWriter(WandbWriter(config, path), "Weights & Biases"))
        if config.logging.tensorboard:
            trackers.append(TrackerWriter(TensorBoardWriter(path, last_step=last_step), "TensorBoard"))
        save_config(config, path / CONFIG_FILE)
        _keep_tokenizer(config, path / TOKENIZER_DIR)
        _record_versions(path, last_step, products)
        if parent is not None:
            write_lineage(path, lineage_from(parent))
        self._metrics: list[Writer] = [JsonlWriter(path / METRICS_FILE, last_step=last_step)]
        self._statistics: list[Writer] = [JsonlWriter(path / STATISTICS_FILE, last_step=last_step)]
        self._metrics += trackers
        self._statistics += trackers
        self._log = _LogFile(path / LOG_FILE)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(self._log)

    def write_statistics(self, *, step: int, tokens: int, layers: list[Statistics]) -> None:
        """Append one collected step to layer_statistics.jsonl."""
        record = {
            "step": step,
            "tokens": tokens,
            "layers": [{"layer": index, **values} for index, values in enumerate(layers)],
        }
        for writer in self._statistics:
            writer.write(record)

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        for writer in self._metrics:
            writer.write(record)

    def close(self) -> None:
        """Close every file."""
        for writer in {id(writer): writer for writer in self._metrics + self._statistics}.values():
            writer.close()
        logger.removeHandler(self._log)
        self._log.close()


class _LogFile(logging.FileHandler):
    """log.txt; a line that a full disk refuses has been shown on the console all the same."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line, instead of showing a traceback for each."""


def refuse_unwritable(path: Path) -> None:
    """Refuse a run directory that cannot be written, without creating it. Local.

    Raises:
        ConfigError: neither it nor the directory that it would be made in takes files.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"logging.run_dir: {path} cannot be written ({error.strerror}: {existing}); choose another directory"
        ) from None


def refuse_foreign_run(path: Path, config: RunConfig, *, resuming: bool) -> None:
    """Refuse to mix two runs in one directory. Local; before anything is written.

    What an attempt left that ended before its first checkpoint is not another run: the same command starts over there.

    Raises:
        ConfigError: `path` holds metrics of a run that this one does not continue.
    """
    if not (path / METRICS_FILE).exists() or (path / METRICS_FILE).stat().st_size == 0:
        return
    if not resuming:
        if config.checkpoint.resume and load_config(path / CONFIG_FILE, mechanisms=SAVED_MECHANISMS) == config:
            return
        raise ConfigError(
            f"logging.run_dir: {path} already holds a run that cannot be resumed (no checkpoint, or "
            f"checkpoint.resume=false); "
            "choose another directory or delete it"
        )
    earlier = load_config(path / CONFIG_FILE, mechanisms=SAVED_MECHANISMS)
    if earlier.model.num_layers != config.model.num_layers:
        raise ConfigError(
            f"logging.run_dir: {path} holds a run with model.num_layers={earlier.model.num_layers}, not "
            f"{config.model.num_layers}; choose another directory"
        )


def restore_products(run_dir: Path) -> None:
    """Multiply as the run's last start did, where that was on such a machine. Local."""
    choice.restore((recorded_versions(run_dir) or {}).get("products"))


def _record_versions(run_dir: Path, last_step: int, products: dict[str, Any] | None) -> None:
    """Add a line with the step that an attempt starts after, unless the attempt before it had the same versions."""
    writer = JsonlWriter(run_dir / VERSIONS_FILE, last_step=last_step)
    now = {"step": last_step, **installed_versions(), "products": products}
    before = recorded_versions(run_dir)
    if before is None or before | {"step": last_step} != now:
        writer.write(now)
    writer.close()


def _keep_tokenizer(config: RunConfig, target: Path) -> None:
    if (task := task_of(config.data)) is not None:
        if not target.exists():
            with making(target) as folder:
                task_tokenizer(task).save_pretrained(folder)
        return
    assert config.data.tokenizer is not None
    source = Path(config.data.tokenizer)
    if source.is_dir() and source.resolve() != target.resolve() and not target.exists():
        with making(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
