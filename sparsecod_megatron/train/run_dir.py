"""The run directory: resolved configuration, tokenizer, metrics, statistics, checkpoints and log of one run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecod_megatron.config import RunConfig, load_config, save_config
from sparsecod_megatron.config.run_files import CONFIG_FILE, LOG_FILE, METRICS_FILE, STATISTICS_FILE, TOKENIZER_DIR
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.metrics import Statistics
from sparsecod_megatron.metrics.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writer

logger = logging.getLogger("sparsecod")


class RunDirectory:
    """Files that rank 0 writes during a run.

    Args:
        path: RUN.
        config: resolved, kept as config.yaml.
        last_step: step the run starts after; later lines of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, config: RunConfig, *, last_step: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_config(config, path / CONFIG_FILE)
        assert config.data.tokenizer is not None
        _copy_tokenizer(Path(config.data.tokenizer), path / TOKENIZER_DIR)
        self._metrics: list[Writer] = [JsonlWriter(path / METRICS_FILE, last_step=last_step)]
        self._statistics: list[Writer] = [JsonlWriter(path / STATISTICS_FILE, last_step=last_step)]
        trackers: list[Writer] = []
        if config.logging.wandb.mode != "disabled":
            trackers.append(WandbWriter(config, path))
        if config.logging.tensorboard:
            trackers.append(TensorBoardWriter(path, last_step=last_step))
        self._metrics += trackers
        self._statistics += trackers
        self._log = logging.FileHandler(path / LOG_FILE)
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


def refuse_foreign_run(path: Path, config: RunConfig, *, resuming: bool) -> None:
    """Refuse to mix two runs in one directory. Local; before anything is written.

    Raises:
        ConfigError: `path` holds metrics of a run that this one does not continue.
    """
    if not (path / METRICS_FILE).exists() or (path / METRICS_FILE).stat().st_size == 0:
        return
    if not resuming:
        raise ConfigError(
            f"logging.run_dir: {path} already holds a run that cannot be resumed (no checkpoint, or "
            f"checkpoint.resume=false); "
            "choose another directory or delete it"
        )
    earlier = load_config(path / CONFIG_FILE)
    if earlier.model.num_layers != config.model.num_layers:
        raise ConfigError(
            f"logging.run_dir: {path} holds a run with model.num_layers={earlier.model.num_layers}, not "
            f"{config.model.num_layers}; choose another directory"
        )


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.is_dir() and source.resolve() != target.resolve() and not target.exists():
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        temporary.rename(target)
