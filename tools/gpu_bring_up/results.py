"""What is kept of all steps: JSON, a Markdown table, and the block of docs/GPU.md that holds the last card's."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsecod_megatron.files import write_text
from tools.gpu_bring_up.bench import PASS, Check, totals
from tools.gpu_bring_up.environment import CARD
from tools.gpu_bring_up.process import ROOT

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"
PAGE = ROOT / "docs/GPU.md"
BEGIN, END = "<!-- bring-up: begin -->", "<!-- bring-up: end -->"
MAX_WIDTH = 90
"""Characters of a figure on the terminal."""


def write_results(output: Path, checks: Sequence[Check], *, seconds: float) -> None:
    """Both files, whole or as they were; after every step, because what runs this may end it."""
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "checks": [asdict(check) for check in checks],
    }
    for name, text in ((RESULTS_FILE, json.dumps(content, indent=1) + "\n"), (TABLE_FILE, markdown(content))):
        write_text(output / name, text)


def markdown(content: dict[str, Any]) -> str:
    """The table, with card, versions, date and commit above it."""
    checks = [Check(**check) for check in content["checks"]]
    lines = [f"{_heading(checks)}; {content['date']}, commit {content['commit']}, {content['seconds']:.0f} s.", ""]
    lines += ["| step | check | result | figure |", "|---|---|---|---|"]
    cells = ((check.step, check.name, check.state, check.figure) for check in checks)
    lines += [f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in cells]
    return "\n".join(lines) + "\n"


def _heading(checks: Sequence[Check]) -> str:
    values = {check.name: check.values for check in checks}
    card, versions = values.get(CARD, {}), values.get("versions", {})
    if not card:
        return "Rehearsal without a card"
    return (
        f"{card['card']}, {card['memory_gib']} GiB, driver {card['driver']}; Python {versions.get('python')}, "
        f"torch {versions.get('torch')}"
    )


def closing_table(checks: Sequence[Check]) -> str:
    """For the terminal: a line a check, and the totals."""
    lines = [
        f"{check.state} {check.seconds:6.1f} s  {check.step}: {check.name}: {check.figure[:MAX_WIDTH]}"
        for check in checks
    ]
    return "\n".join([*lines, totals(checks)])


def publish(output: Path, page: Path = PAGE) -> None:
    """Put the table of a finished run into docs/GPU.md.

    Raises:
        SystemExit: in one line: no results, a rehearsal's, or a page without the place for them.
    """
    path = output / RESULTS_FILE
    if not path.exists():
        raise SystemExit(f"gpu_bring_up.sh: {path} does not exist; give the output folder of a run")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not any(check["name"] == CARD and check["state"] == PASS for check in content["checks"]):
        raise SystemExit(f"gpu_bring_up.sh: {path} is of a run without a card; only a card's is published")
    text, places = page.read_text(encoding="utf-8"), re.compile(f"{BEGIN}\n.*?{END}\n", re.DOTALL)
    if len(places.findall(text)) != 1:
        raise SystemExit(f"gpu_bring_up.sh: {page} needs one block from '{BEGIN}' to '{END}'")
    block = f"{BEGIN}\n\n{markdown(content)}\n{END}\n"
    page.write_text(places.sub(lambda _: block, text), encoding="utf-8")


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
