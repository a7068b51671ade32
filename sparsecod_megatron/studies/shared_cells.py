"""Cells that another study has run already: the control of one study is often a place of the next."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparsecod_megatron.config import RunConfig, load_config, save_config
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import making
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS
from sparsecod_megatron.studies.cell import RESULT_FILE, measurement, read_result, write_result
from sparsecod_megatron.studies.grid import CELLS_FOLDER, Cell, Study
from sparsecod_megatron.studies.scoring import MODEL_FOLDER


def shared_cells(study: Study, others: Sequence[Path]) -> dict[str, Path]:
    """Cells that have not begun, and the finished one elsewhere that is the same run, measured the same way.

    Args:
        study: whose cells are wanted.
        others: outputs of studies.

    Raises:
        ConfigError: an output without cells.
    """
    wanted = [cell for cell in study.cells if not cell.directory.exists()]
    found: dict[str, Path] = {}
    for folder in (folder for other in others for folder in _finished(other)):
        if read_result(folder)["measured"] != measurement(study):
            continue
        run = _comparable(load_config(folder / CONFIG_FILE, mechanisms=SAVED_MECHANISMS))
        found |= {cell.name: folder for cell in wanted if cell.name not in found and _comparable(cell.config) == run}
    return found


def take_over(study: Study, shared: Mapping[str, Path]) -> None:
    """Copy cells but for their weights, as if they had been run here; where each is from stays in `result.json`.

    Args:
        study: whose cells they become.
        shared: name of each and the finished one, as `shared_cells` finds them.
    """
    for cell in study.cells:
        if cell.name in shared:
            _copy(cell, shared[cell.name])


def _copy(cell: Cell, donor: Path) -> None:
    result = {"shared_from": str(donor)} | read_result(donor) | {"cell": cell.name, "labels": dict(cell.labels)}
    with making(cell.directory) as folder:
        weights = shutil.ignore_patterns(MODEL_FOLDER, CHECKPOINTS_DIR)
        shutil.copytree(donor, folder, ignore=weights, dirs_exist_ok=True)
        save_config(cell.config, folder / CONFIG_FILE)
        write_result(folder, result)


def _finished(output: Path) -> list[Path]:
    if not (output / CELLS_FOLDER).is_dir():
        raise ConfigError(f"--reuse {output}: has no {CELLS_FOLDER}; give the --output of a study that was run")
    return sorted(path.parent for path in (output / CELLS_FOLDER).glob(f"*/{RESULT_FILE}"))


def _comparable(config: RunConfig) -> RunConfig:
    """The run wherever it is written."""
    return replace(config, logging=replace(config.logging, run_dir=""))
