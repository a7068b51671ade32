"""Makes the tables of docs/RESULTS.md from the studies that docs/results/nano keeps, and keeps a study that was run.

    bash tools/run_in_venv.sh python tools/results_tables.py [studies/init/table.json …]

A file that is given takes the place of the one kept, which stays beside it where it had other tokens.
tests/unit/studies/test_results_page.py compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is not part of the installed package

from sparsecod_megatron.studies.kept import read_kept
from tests.helpers.results_page import KEPT, PAGE, SHORTER, updated


def main() -> None:
    """Keep what is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", type=Path, metavar="table.json", help="of a study that was run")
    for path in parser.parse_args().tables:
        keep(path)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def keep(path: Path) -> None:
    """Keep a study's cells, and the command that anyone can give."""
    found = json.loads(path.read_text(encoding="utf-8"))
    name = found["study"]
    place, shorter = KEPT / f"{name}.json", KEPT / f"{name}{SHORTER}.json"
    if place.exists() and not shorter.exists() and tokens(place) != tokens(path):
        place.rename(shorter)
    command = f"sparsecod study examples/studies/nano/{name}.yaml run.data.prefix=data/books --output studies/{name}"
    kept = {"study": name, "command": command, "cells": found["cells"]}
    place.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")


def tokens(path: Path) -> set[float]:
    """Tokens that cells were trained on."""
    return {cell.metrics["tokens"] for cell in read_kept(path).cells}


if __name__ == "__main__":
    main()
