"""`sparsecod report`: one HTML page, or one figure, of what runs measured."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Show runs: an HTML page that works offline (.html), or the figure variance by depth (.png, .svg, .pdf)."
EXAMPLE = "sparsecod report runs/dense runs/moe --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories, in the order of the page's legend"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="FILE.html, FILE.png, FILE.svg or FILE.pdf; replaced"
    )


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the page or the figure.

    Raises:
        SparsecodError: an output that cannot be written, or a path that is not a readable run.
    """
    from sparsecod_megatron.analysis.report.output import check_output

    check_output(args.output, (".html", ".png", ".svg", ".pdf"))  # before reading gigabytes of runs

    from sparsecod_megatron.analysis.runs import load_runs

    runs = load_runs(args.runs)
    if args.output.suffix == ".html":
        from sparsecod_megatron.analysis.report import write_report

        write_report(runs, args.output)
    else:
        from sparsecod_megatron.analysis.depth_plot import plot_variance_by_depth

        plot_variance_by_depth(runs, args.output)
    size_mib = args.output.stat().st_size / 2**20
    print(f"wrote {args.output} ({size_mib:.1f} MiB): {', '.join(run.name for run in runs)}")
