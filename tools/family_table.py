"""Prints the table of docs/HUGGINGFACE.md that says what works with a model of each family, by trying it on a tiny one.

    bash tools/run_in_venv.sh python tools/family_table.py [--write]

`--write` puts it into the page. tests/unit/hf/test_family_table.py compares.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is not part of the installed package

import transformers

from tests.helpers.family_table import BEGIN, END, section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "HUGGINGFACE.md"


def main() -> None:
    """Try everything, about a second a family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the page")
    write = parser.parse_args().write
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = section()
    if not write:
        print(found)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + found + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
