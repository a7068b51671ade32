"""An atlas: every mechanism, remedy and sparsity of many studies, each against its own study's control, in one table.

A number of a row is the difference of its place from its study's control, seed by seed, judged as the studies' claims
are, and once more by Holm's correction for all rows that were tested by the same metric. Perplexities are compared
where tokens, parameters or operations are equal; a cell without a number has a reason instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsecod_megatron.config.fields import bound_problems
from sparsecod_megatron.config.typed import merge_typed, read_updates
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.studies.atlas_cells import AtlasRow, judged
from sparsecod_megatron.studies.atlas_results import Kept, longest_of, read_all, shorter_runs
from sparsecod_megatron.studies.atlas_schema import AtlasConfig, ComparisonConfig, PlaceConfig


@dataclass(frozen=True)
class Atlas:
    """All rows, and what is not among them.

    Attributes:
        config: the atlas's file.
        rows: in its order.
        shorter: files with places that a longer run shows, and these places.
        missing: studies of the atlas's file of which no result was given.
        left_out: study or STUDY/PLACE of the results given, and why.
    """

    config: AtlasConfig
    rows: list[AtlasRow]
    shorter: list[tuple[Kept, list[str]]]
    missing: list[str]
    left_out: dict[str, str]


def load_atlas(path: Path, results: Sequence[Path]) -> Atlas:
    """Read an atlas's file and results of studies, and compare.

    Args:
        path: the atlas's YAML.
        results: `table.json` of studies, shortened or not, or folders of them.

    Raises:
        SparsecodError: a file that cannot be used, a control or a place that no result has, or a place that the atlas's
            file does not name.
    """
    config = merge_typed(AtlasConfig, read_updates(AtlasConfig, path, ()))
    for number, comparison in enumerate(config.comparisons):
        for section in (comparison, *comparison.places.values()):
            for problem in bound_problems(section):
                raise ConfigError(f"{path}: comparisons[{number}] ({comparison.study}): {problem}")
    files = read_all(results)
    try:
        rows = judged(list(_rows(config, files)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    given = {kept.study for kept in files}
    shown = [(row.kept, place) for row in rows for place in (row.place, row.control) if place is not None]
    missing = sorted({comparison.study for comparison in config.comparisons} - given)
    left_out = {name: why for name, why in config.left_out.items() if name.partition("/")[0] in given}
    return Atlas(config, rows, list(shorter_runs(files, shown)), missing, left_out)


def _rows(config: AtlasConfig, files: Sequence[Kept]) -> Iterator[AtlasRow]:
    """Every place that is shown, without numbers.

    Raises:
        ConfigError: see `load_atlas`.
    """
    given = list(dict.fromkeys(kept.study for kept in files))
    kinds = list(dict.fromkeys(kind for each in config.comparisons for kind in _kinds(each)))
    found: list[AtlasRow] = []
    for comparison in config.comparisons:
        if comparison.study not in given:
            continue
        for place, own in (comparison.places or _others(config, comparison, files)).items():
            kept = longest_of(files, comparison.study, place, comparison.control)
            kind = own.kind or comparison.kind
            sparsity = comparison.sparsity if own.sparsity is None else own.sparsity
            mechanism, setting = own.mechanism or comparison.mechanism or place, own.setting
            row = AtlasRow(
                0, kind, mechanism, place if setting is None else setting, kind in config.remedies, kept, place,
                comparison.control, comparison.match, sparsity, {},
            )  # fmt: skip
            found.append(row)
    for study in given:
        _check_named(config, study, {place for kept in files if kept.study == study for place in kept.cells})
    for number, row in enumerate(sorted(found, key=lambda row: kinds.index(row.kind)), start=1):
        yield replace(row, number=number)


def _kinds(comparison: ComparisonConfig) -> Iterator[str]:
    yield from (own.kind or comparison.kind for own in comparison.places.values())
    if not comparison.places:
        yield comparison.kind


def _others(config: AtlasConfig, comparison: ComparisonConfig, files: Sequence[Kept]) -> dict[str, PlaceConfig]:
    """Places of a comparison that names none, in the order of the files."""
    taken = {f"{comparison.study}/{place}" for place in _named(config, comparison.study)} | set(config.left_out)
    order = dict.fromkeys(place for kept in files if kept.study == comparison.study for place in kept.cells)
    return {place: PlaceConfig() for place in order if f"{comparison.study}/{place}" not in taken}


def _named(config: AtlasConfig, study: str) -> set[str]:
    """Controls and places of a study that the atlas's file names."""
    own = [comparison for comparison in config.comparisons if comparison.study == study]
    controls = {comparison.control for comparison in own if comparison.control is not None}
    return controls | {place for comparison in own for place in comparison.places}


def _check_named(config: AtlasConfig, study: str, known: set[str]) -> None:
    """Refuse a study, or a place of one, that the atlas's file neither names nor leaves out."""
    own = [comparison for comparison in config.comparisons if comparison.study == study]
    if study in config.left_out or any(not comparison.places for comparison in own):
        return
    unnamed = sorted(place for place in known - _named(config, study) if f"{study}/{place}" not in config.left_out)
    if not own or unnamed:
        what = f"place {unnamed[0]} of study {study}" if own else f"study {study}"
        raise ConfigError(f"{what} has results, but stands neither in comparisons nor in left_out; add it to one")
