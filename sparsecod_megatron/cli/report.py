"""`sparsecod report`: one HTML page of what runs, analyses and compressions measured, or a figure of one kind."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecod_megatron.errors import ConfigError

HELP = (
    "Show training runs, analyses and tables of compressions in an HTML page that works offline (.html), or draw runs' "
    "variance by depth, or compressions' depth scores by sparsity (.png, .svg, .pdf)."
)
EXAMPLE = "sparsecod report runs/dense runs/moe analysis/dense --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="what `sparsecod train`, `analyze` and `compress` (a table) wrote, in the order of the page's legend",
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

    from sparsecod_megatron.analysis.compressions import is_compressions, load_compressions
    from sparsecod_megatron.analysis.directory import is_analysis, load_analyses
    from sparsecod_megatron.analysis.runs import load_runs

    analysed = [path for path in args.directories if is_analysis(path)]
    compressed = [path for path in args.directories if is_compressions(path) and path not in analysed]
    trained = [path for path in args.directories if path not in analysed and path not in compressed]
    if args.output.suffix != ".html":
        _check_figure(args.output, trained, analysed, compressed)
    runs, analyses, tables = load_runs(trained), load_analyses(analysed), load_compressions(compressed)
    if args.output.suffix == ".html":
        from sparsecod_megatron.analysis.report import write_report

        write_report(runs, args.output, analyses=analyses, compressions=tables)
    elif tables:
        from sparsecod_megatron.analysis.compression_plot import plot_scores_by_sparsity

        plot_scores_by_sparsity(tables, args.output)
    else:
        from sparsecod_megatron.analysis.depth_plot import plot_variance_by_depth

        plot_variance_by_depth(runs, args.output)
    names = [*(run.name for run in runs), *(analysis.name for analysis in analyses), *(table.name for table in tables)]
    size_mib = args.output.stat().st_size / 2**20
    print(f"wrote {args.output} ({size_mib:.1f} MiB): {', '.join(names)}")


def _check_figure(output: Path, trained: list[Path], analysed: list[Path], compressed: list[Path]) -> None:
    if analysed:
        raise ConfigError(
            f"--output {output}: the figure shows training runs, but {analysed[0]} is an analysis; "
            f"give FILE.html, or take the pictures in {analysed[0] / 'plots'}"
        )
    if trained and compressed:
        raise ConfigError(
            f"--output {output}: a figure shows runs or compressions, but {trained[0]} is a run and {compressed[0]} a "
            "table of compressions; give FILE.html, or one kind"
        )
