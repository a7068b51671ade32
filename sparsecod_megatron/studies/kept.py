"""What a study found, cell by cell, as `table.json` or a shortened copy of it keeps it: enough to make its table again.

Runs and models are large and are thrown away; the numbers that conclusions rest on are small and stay. Versions differ
in what they keep beside them, never in the cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.studies.grid import Study
from sparsecod_megatron.studies.schema import Labels, setting_name


@dataclass(frozen=True)
class FinishedCell:
    """A cell that was trained and measured.

    Attributes:
        labels: its place.
        seed: of the run.
        metrics: name → value.
        points: `step`, `tokens`, `metrics` and `intervals` of its checkpoints, where several were scored.
        diverged: whether its loss became non-finite.
    """

    labels: Labels
    seed: int
    metrics: dict[str, float]
    points: list[dict[str, Any]]
    diverged: bool


@dataclass(frozen=True)
class KeptStudy:
    """A study's file: its name, the command that ran it, and its cells."""

    study: str
    command: str
    cells: list[FinishedCell]


def read_kept(path: Path) -> KeptStudy:
    """Read a file; earlier versions lack checkpoints, divergence and later metrics.

    Raises:
        DataError: it cannot be read, or is not a study's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            FinishedCell(
                tuple(cell["labels"].items()),
                int(cell["seed"]),
                {name: float(value) for name, value in cell["metrics"].items() if value is not None},
                cell.get("points", []),
                bool(cell.get("diverged", False)),
            )
            for cell in content["cells"]
        ]
        return KeptStudy(str(content["study"]), str(content.get("command", "")), cells)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give table.json of a study") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: not the results of a study (study and cells with labels, seed and metrics); give its table.json, "
            "which `sparsecod study … --table` makes again"
        ) from None


def kept_cells(study: Study, path: Path) -> Sequence[FinishedCell]:
    """The cells of a file, each of which has to be one of the study's.

    Raises:
        ConfigError: the file is another study's, or has places or seeds that this one has not.
        DataError: the file cannot be read, or is not a study's.
    """
    kept = read_kept(path)
    if kept.study != study.config.name:
        raise ConfigError(f"--kept {path}: of study {kept.study}, and this is {study.config.name}; give its own")
    known = {(cell.labels, cell.seed) for cell in study.cells}
    if unknown := [cell for cell in kept.cells if (cell.labels, cell.seed) not in known]:
        raise ConfigError(
            f"--kept {path}: {len(unknown)} of {len(kept.cells)} cells are none of the study's, the first "
            f"{setting_name(unknown[0].labels)}, seed {unknown[0].seed}; give the study's file as it was then"
        )
    return kept.cells
