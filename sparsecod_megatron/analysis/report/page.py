"""The report page: template, styles, code and data put into one HTML file that needs nothing else.

The page's own files lie in `analysis/report_assets`. A content security policy with their hashes lets the browser run
exactly these and fetch nothing, so the page stays offline whatever a run's name or configuration holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.compressions import CompressionTable
from sparsecod_megatron.analysis.directory import AnalysisDirectory
from sparsecod_megatron.analysis.report.payload import report_payload
from sparsecod_megatron.analysis.runs import Run
from sparsecod_megatron.files import replacing_output

ASSETS_PACKAGE, ASSETS_FOLDER = "sparsecod_megatron.analysis", "report_assets"
STYLES = ("page.css", "figures.css", "controls.css")
# In the order of their use of each other: joined to one script, in one function, so that no name is global.
SCRIPTS = (
    "format.js",
    "color.js",
    "scale.js",
    "svg.js",
    "data.js",
    "table.js",
    "line_chart.js",
    "bar_chart.js",
    "heat_map.js",
    "figure.js",
    "depth_views.js",
    "router_view.js",
    "training_view.js",
    "scores_view.js",
    "compressions_view.js",
    "atlas_view.js",
    "app.js",
)
MAX_NAMES = 3


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    analyses: Sequence[AnalysisDirectory] = (),
    compressions: Sequence[CompressionTable] = (),
    atlases: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page of one or more runs, analyses, tables of compressions and atlases.

    Args:
        runs: in the order of the page.
        analyses: likewise.
        compressions: likewise.
        atlases: as `report_page` takes them.
        output: the HTML file; replaced whole.

    Raises:
        ConfigError: `output` cannot be written.
    """
    page = report_page(runs, analyses, compressions, atlases)
    with replacing_output(output) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def report_page(
    runs: Sequence[Run],
    analyses: Sequence[AnalysisDirectory] = (),
    compressions: Sequence[CompressionTable] = (),
    atlases: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page's text; the same directories always give the same text.

    Args:
        runs: in the order of the page.
        analyses: likewise.
        compressions: likewise.
        atlases: each with `name`, `command`, `answer` [text], `columns` [title], `rows` [[cell]], a cell being a
            number, a text or {text, value} with what its column is sorted by, and `picture`, a data URI of a PNG.
    """
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS) + "})();"
    style = "\n".join(_asset(name) for name in STYLES)
    names = [
        *(run.name for run in runs),
        *(analysis.name for analysis in analyses),
        *(table.name for table in compressions),
        *(atlas["name"] for atlas in atlases),
    ]
    pictures = "; img-src data:" if atlases else ""
    parts = {
        "title": html.escape(_title(names)),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}{pictures}",
        "style": style,
        "data": embedded_json(report_payload(runs, analyses, compressions) | {"atlases": list(atlases)}),
        "script": script,
    }
    page = _asset("page.html")
    pieces = page.split("%%")  # text, name, text, name, …: one pass, so that no data is read as a place holder
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def embedded_json(value: Any) -> str:
    """JSON that can stand in an HTML script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _title(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{', '.join(names[:MAX_NAMES])}{more}"


def _asset(name: str) -> str:
    return (files(ASSETS_PACKAGE) / ASSETS_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
