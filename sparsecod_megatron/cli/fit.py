"""`sparsecod fit`: a scaling law fitted to a table, with intervals and the error of what it has not seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparsecod_megatron.cli.options import check_at_least, names
from sparsecod_megatron.errors import ConfigError

HELP = "Fit a scaling law to the points of a table: a study's table.csv, or any CSV file with a column per variable."
EXAMPLE = (
    "sparsecod fit studies/depth/table.csv --law power --x parameters_total --y loss\n"
    "  sparsecod fit runs.csv --law chinchilla --x parameters,tokens --y loss --group run --output laws/chinchilla"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("table", type=Path, metavar="TABLE.csv", help="with a header; COL_low, COL_high are intervals")
    parser.add_argument("--law", required=True, metavar="NAME", help="docs/LAWS.md has them")
    parser.add_argument("--x", required=True, metavar="A,B", help="columns of the law's variables, in its order")
    parser.add_argument("--y", required=True, metavar="COL", help="column that the law is of")
    parser.add_argument("--where", metavar="COL=TEXT,…", help="take only rows with this text in these columns")
    parser.add_argument(
        "--group", metavar="COL", help="column that names the run of a point; runs are resampled whole (default: rows)"
    )
    parser.add_argument("--unweighted", action="store_true", help="do not weigh points by 1/σ² of their intervals")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the intervals (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the resamples (default 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write fit.json and fit.png; replaced")


def run(args: argparse.Namespace) -> None:
    """Fit the law, and print its coefficients.

    Raises:
        SparsecodError: a table, columns or a law that cannot be used, or too few points.
    """
    from sparsecod_megatron.files import check_writable, write_text
    from sparsecod_megatron.studies.forms import find_law
    from sparsecod_megatron.studies.law_points import read_rows, select
    from sparsecod_megatron.studies.law_text import law_lines
    from sparsecod_megatron.studies.laws import fit_law

    check_at_least(args, resamples=40, seed=0)
    variables, law = names(args.x), find_law(args.law)
    law.check_variables("--x", variables)
    if args.output is not None:
        check_writable(args.output)
    selected = select(
        read_rows(args.table),
        variables,
        args.y,
        where=_where(args.where),
        group=args.group,
        is_weighted=not args.unweighted,
    )
    fit = fit_law(law.name, selected.points, seed=args.seed, num_resamples=args.resamples)
    for line in (*law_lines(fit, variables, args.y), *(f"  note: {note}" for note in selected.notes)):
        print(line)
    if args.output is not None:
        from sparsecod_megatron.studies.law_figure import draw_law

        settings = {"table": str(args.table), "x": variables, "y": args.y, "where": args.where, "seed": args.seed}
        content = settings | {"points": list(selected.notes)} | fit.as_dict()
        write_text(args.output / "fit.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        draw_law(args.output / "fit.png", fit, selected.points, variables=variables, value=args.y)
        print(f"wrote {args.output}: fit.json, fit.png")


def _where(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in names(text)] if text else []
    if any(not sign for _, sign, _ in pairs):
        raise ConfigError(f"--where {text}: is not COL=TEXT; give such pairs with commas between them")
    return {name: value for name, _, value in pairs}
