"""Kept results of studies, of any version and length, and which of them an atlas shows at each place.

A study that was run again for more tokens leaves two files of one name. Each place is shown by the longest run that has
it and its control; what is not shown is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.studies.intervals import mean_over_seeds
from sparsecod_megatron.studies.kept import read_kept
from sparsecod_megatron.studies.schema import Labels

SEPARATOR = "/"
"""Between the labels of a place."""


@dataclass(frozen=True)
class Kept:
    """One study as `table.json`, or a shortened copy of it, has it.

    Attributes:
        path: the file.
        study: name of the study.
        command: that ran it.
        cells: place → seed → metrics; none of a cell that diverged.
        labels: place → its labels.
    """

    path: Path
    study: str
    command: str
    cells: dict[str, dict[int, dict[str, float]]]
    labels: dict[str, Labels]

    def tokens(self, place: str) -> float | None:
        """Training tokens of a place, the same for all seeds."""
        return self.mean(place, "tokens")

    def mean(self, place: str, metric: str) -> float | None:
        """Mean over the seeds that have it."""
        found = [metrics[metric] for metrics in self.cells[place].values() if metric in metrics]
        return mean_over_seeds(found).value if found else None


def read_all(paths: Sequence[Path]) -> list[Kept]:
    """Read files, and those that lie in directories.

    Raises:
        DataError: a file that is not a study's, no file at all, or two of one study at one length.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise DataError(f"{paths[0]}: holds no *.json; give table.json of studies, or a folder of kept ones")
    found = [_read(path) for path in files]
    seen: dict[tuple[str, float | None], Path] = {}
    for kept in found:
        key = (kept.study, _longest(kept))
        if key in seen:
            raise DataError(
                f"{kept.path}: study {kept.study} with as many tokens as in {seen[key]}; which of the two counts "
                "cannot be told, give one"
            )
        seen[key] = kept.path
    return found


def _read(path: Path) -> Kept:
    kept = read_kept(path)
    cells: dict[str, dict[int, dict[str, float]]] = {}
    for cell in kept.cells:
        cells.setdefault(_place(cell.labels), {})[cell.seed] = cell.metrics
    return Kept(path, kept.study, kept.command, cells, {_place(cell.labels): cell.labels for cell in kept.cells})


def _place(labels: Labels) -> str:
    return SEPARATOR.join(label for _, label in labels)


def _longest(kept: Kept) -> float | None:
    return max((tokens for place in kept.cells if (tokens := kept.tokens(place)) is not None), default=None)


def longest_of(files: Sequence[Kept], study: str, place: str, control: str | None) -> Kept:
    """The longest run of a study that has a place and its control.

    Raises:
        ConfigError: none of the files has them.
    """
    of_study = [kept for kept in files if kept.study == study]
    for wanted, what in ((control, "control"), (place, "place")):
        if wanted is not None and not any(wanted in kept.cells for kept in of_study):
            known = sorted({name for kept in of_study for name in kept.cells})
            raise ConfigError(
                f"study {study}: {what} {wanted} is in none of {', '.join(kept.path.name for kept in of_study)}, which "
                f"have {', '.join(known)}; correct the atlas's file"
            )
    whole = [kept for kept in of_study if place in kept.cells and (control is None or control in kept.cells)]
    if not whole:
        raise ConfigError(f"study {study}: no file has both {place} and its control {control}; run them together")
    return max(whole, key=lambda kept: kept.tokens(place if control is None else control) or 0.0)


def shorter_runs(files: Sequence[Kept], shown: Sequence[tuple[Kept, str]]) -> Iterator[tuple[Kept, list[str]]]:
    """Files with places that a longer run of the same study shows: the file, and these places.

    Args:
        files: all that were read.
        shown: each place that the atlas shows, and the one of `files` that it shows it of.
    """
    for kept in files:
        own = {place for other, place in shown if other is kept}
        elsewhere = {place for other, place in shown if other is not kept and other.study == kept.study}
        if hidden := [place for place in kept.cells if place in elsewhere - own]:
            yield kept, hidden
