"""The files of an atlas: page, tables, picture, and the report page whose table sorts by any column."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.report import write_report
from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.atlas import Atlas
from sparsecod_megatron.studies.atlas_answer import answer, effect
from sparsecod_megatron.studies.atlas_cells import COLUMNS, AtlasRow, Entry
from sparsecod_megatron.studies.atlas_figure import draw_atlas
from sparsecod_megatron.studies.atlas_text import (
    MISSING,
    SCALES,
    TITLES,
    against,
    as_csv,
    as_json,
    page,
    shown,
    tokens_text,
)


def write_atlas(atlas: Atlas, output: Path, *, page_file: Path | None, command: str) -> int:
    """Write all files of an atlas.

    Args:
        atlas: what was found.
        output: directory of `atlas.md`, `.csv`, `.json`, `.png` and `.html`.
        page_file: where page and picture are written once more.
        command: that makes them, named in the page.

    Returns:
        Rows in the picture.

    Raises:
        ConfigError: a file cannot be written.
    """
    drawn = draw_atlas(atlas, output / "atlas.png")
    write_text(output / "atlas.md", page(atlas, command=command, picture="atlas.png"))
    write_text(output / "atlas.csv", as_csv(atlas))
    write_text(output / "atlas.json", as_json(atlas, command=command))
    picture = base64.b64encode((output / "atlas.png").read_bytes()).decode("ascii")
    write_report([], output / "atlas.html", atlases=[_shown(atlas, command, picture)])
    if page_file is not None:
        draw_atlas(atlas, page_file.with_suffix(".png"))
        write_text(page_file, page(atlas, command=command, picture=page_file.with_suffix(".png").name))
    return drawn


def _shown(atlas: Atlas, command: str, picture: str) -> dict[str, Any]:
    """What the report shows of an atlas; see `report_page`."""
    return {
        "name": atlas.config.title,
        "command": command,
        "answer": [text.replace("*", "") for text in answer(atlas.rows)],
        "columns": ["row", "mechanism", "kind", "effect", "against", "tokens", *(TITLES[column] for column in COLUMNS)],
        "rows": [_row(row) for row in atlas.rows],
        "picture": f"data:image/png;base64,{picture}",
    }


def _row(row: AtlasRow) -> list[Any]:
    """Cells as texts, or texts with the number that they are sorted by: Δ where there is one."""
    tokens = {"text": tokens_text(row), "value": row.tokens[0]}
    head = [row.number, row.name, row.kind, effect(row) or MISSING, against(row), tokens]
    return [*head, *(_cell(column, row.entries[column]) for column in COLUMNS)]


def _cell(column: str, entry: Entry) -> dict[str, Any]:
    text = shown(column, entry)
    mean = entry.difference or entry.value
    if text == MISSING or mean is None:
        return {"text": f"{MISSING} {entry.reason}", "value": None}
    return {"text": text, "value": mean.value * SCALES.get(column, 1.0)}
