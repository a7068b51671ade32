"""The tables of docs/RESULTS.md that are of kept studies, made again from what is kept."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

from sparsecod_megatron.studies import Study, load_study
from sparsecod_megatron.studies.claims import Verdict
from sparsecod_megatron.studies.kept import kept_cells
from sparsecod_megatron.studies.table import Table, make_table, markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE, KEPT, STUDIES = ROOT / "docs/RESULTS.md", ROOT / "docs/results/nano", ROOT / "examples/studies/nano"
SHORTER = "_300k"
"""Ends the name of a file that a longer run has replaced."""
VOCAB_SIZE = 2048
"""Of the tokenizer that the studies took, which is not kept and which operations depend on."""
SECTION = re.compile(r"^### (\w+)\n.*?(?=^##|\Z)", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
COUNT = re.compile(r"^\d+ of the \d+ claims are supported, [^.]*\.", re.MULTILINE)


def kept_studies() -> list[str]:
    """Names of the studies whose results are kept."""
    return sorted(path.stem for path in KEPT.glob("*.json") if not path.stem.endswith(SHORTER))


@cache
def kept_study(name: str) -> tuple[Study, Table]:
    """A study as it is shipped, and the table of what is kept of it."""
    study = load_study(STUDIES / f"{name}.yaml", Path(name), [f"run.model.vocab_size={VOCAB_SIZE}"])
    return study, make_table(study.config, kept_cells(study, KEPT / f"{name}.json"))


def updated(page: str) -> str:
    """The page with the tables of all studies as their kept results give them.

    A section's table is told by its first column: one that the study's tables have not stays as it is written.
    """
    made = {name: kept_study(name) for name in kept_studies()}

    def section(found: re.Match[str]) -> str:
        if found[1] not in made:
            return found[0]
        study, table = made[found[1]]
        tables = {_first_column(text): text for text in TABLE.findall(markdown(study.config, table, "-"))}
        return TABLE.sub(lambda old: tables.get(_first_column(old[0]), old[0]), found[0])

    page = SECTION.sub(section, page)
    return COUNT.sub(lambda _: _counted([verdict for _, table in made.values() for verdict in table.verdicts]), page)


def _first_column(table: str) -> str:
    return table.split("|")[1].strip()


def _counted(verdicts: list[Verdict]) -> str:
    plain, holm = (Counter(said) for said in zip(*((v.verdict, v.verdict_holm) for v in verdicts), strict=True))
    return (
        f"{plain['supported']} of the {len(verdicts)} claims are supported, {plain['not supported']} not supported, "
        f"{plain['not separable']} not separable; corrected for the claims of each study "
        f"{holm['supported']}, {holm['not supported']} and {holm['not separable']}."
    )
