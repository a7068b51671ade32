"""`sparsecod atlas`: every mechanism of many studies in one table, each against its own study's control."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

HELP = (
    "Put every mechanism, remedy and sparsity of many studies into one table, each against its own study's control, "
    "with a picture of variance against usefulness."
)
EXAMPLE = "sparsecod atlas examples/studies/nano_atlas.yaml docs/results/nano --output studies/atlas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("atlas", type=Path, metavar="ATLAS.yaml", help="controls and names (docs/STUDIES.md)")
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.json", help="table.json of studies, or folders of such files"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="atlas.md, .csv, .json, .png and .html; replaced"
    )
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write page and picture here too; replaced")


def run(args: argparse.Namespace) -> None:
    """Read the results, compare, and write the atlas.

    Raises:
        SparsecodError: files that cannot be used, a control that no result has, or an output that cannot be written.
    """
    from sparsecod_megatron.errors import ConfigError
    from sparsecod_megatron.files import check_output, check_writable

    check_writable(args.output)
    if args.page is not None:
        check_output(args.page, (".md",))

    from sparsecod_megatron.studies.atlas import load_atlas
    from sparsecod_megatron.studies.atlas_output import write_atlas

    atlas = load_atlas(args.atlas, args.results)
    if not atlas.rows:
        raise ConfigError(f"{args.atlas}: no comparison has a result in {args.results[0]}; give other results")
    words = ["sparsecod", "atlas", str(args.atlas), *map(str, args.results), "--output", str(args.output)]
    words += [] if args.page is None else ["--page", str(args.page)]
    drawn = write_atlas(atlas, args.output, page_file=args.page, command=shlex.join(words))
    files = ", ".join(f"{args.output}{os.sep}atlas.{end}" for end in ("md", "csv", "json", "png", "html"))
    print(f"{len(atlas.rows)} rows, {drawn} in the picture: {files}" + (f", {args.page}" if args.page else ""))
