"""`sparsecod report`: one HTML page of what runs and analyses measured, or one figure of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecod_megatron.errors import ConfigError

HELP = (
    "Show training runs and analyses in an HTML page that works offline (.html), or draw runs' variance by depth "
    "(.png, .svg, .pdf)."
)
EXAMPLE = "sparsecod report runs/dense runs/moe analysis/dense --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="RUN_OR_ANALYSIS",
        help="what `sparsecod train` and `sparsecod analyze` wrote, in the order of the page's legend",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="FILE.html, FILE.png, FILE.svg or FILE.pdf; replaced"
    )


def run(args: argparse.Namespace) -> None:
    """Read the directories and write the page or the figure.

    Raises:
        SparsecodError: an output that cannot be written, or a path that is neither a readable run nor an analysis.
    """
    from sparsecod_megatron.files import check_output

    check_output(args.output, (".html", ".png", ".svg", ".pdf"))  # before reading gigabytes of runs

    from sparsecod_megatron.analysis.directory import is_analysis, load_analyses
    from sparsecod_megatron.analysis.runs import load_runs

    is_page = args.output.suffix == ".html"
    analysed = [path for path in args.directories if is_analysis(path)]
    if analysed and not is_page:
        raise ConfigError(
            f"--output {args.output}: the figure shows training runs, but {analysed[0]} is an analysis; "
            f"give FILE.html, or take the pictures in {analysed[0] / 'plots'}"
        )
    runs = load_runs([path for path in args.directories if path not in analysed])
    analyses = load_analyses(analysed)
    if is_page:
        from sparsecod_megatron.analysis.report import write_report

        write_report(runs, args.output, analyses=analyses)
    else:
        from sparsecod_megatron.analysis.depth_plot import plot_variance_by_depth

        plot_variance_by_depth(runs, args.output)
    names = [*(run.name for run in runs), *(analysis.name for analysis in analyses)]
    size_mib = args.output.stat().st_size / 2**20
    print(f"wrote {args.output} ({size_mib:.1f} MiB): {', '.join(names)}")
