"""`sparsecod study`: a grid of runs from one YAML file, each trained, exported, scored and evaluated, as one table."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.launch import RanksFailed, Stopped
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.studies.grid import Study
    from sparsecod_megatron.studies.runner import Outcome

HELP = "Train, export, score and evaluate every cell of a grid, and make one table of them; resumes where it stopped."
EXAMPLE = "sparsecod study examples/studies/nano/depth.yaml run.data.prefix=data/books --output studies/depth --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="examples/studies")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's; run.* apply to every cell's run"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="cells, table.{md,csv,json}, figures")
    parser.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="output of another study, whose finished cells of the same run and measurement are copied; repeatable",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the cells and what they take; write nothing")
    what.add_argument("--submit", choices=("slurm",), help="submit one job per cell instead of running here")
    what.add_argument("--cell", metavar="NAME", help="run this cell alone, without the table")
    what.add_argument("--table", action="store_true", help="make the table from the cells that are done; run nothing")
    what.add_argument(
        "--kept", type=Path, metavar="FILE", help="make the table from those that this table.json keeps; run nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Run the study, or the part of it that was asked for.

    Raises:
        SparsecodError: a study, a cell or an output that cannot be used.
        RanksFailed: cells failed; the table is of the others.
        Stopped: a signal ended the study; the running cells have saved.
    """
    from sparsecod_megatron.files import check_writable
    from sparsecod_megatron.studies import load_study
    from sparsecod_megatron.studies.shared_cells import shared_cells, take_over

    study = load_study(args.study, args.output, args.overrides)
    check_writable(args.output)
    command = ["study", str(args.study), *args.overrides, f"--output={args.output}"]
    command += [f"--reuse={other}" for other in args.reuse]
    if args.kept:
        if args.reuse:
            raise ConfigError(
                f"--reuse {args.reuse[0]}: --kept runs nothing that cells could be taken for; leave one out"
            )
        _write(study, [*command, f"--kept={args.kept}"], args.kept)
        return
    if args.cell:
        from sparsecod_megatron.studies.cell import run_cell

        run_cell(study, study.cell(args.cell))
        return
    shared = shared_cells(study, args.reuse)
    if args.dry_run:
        from sparsecod_megatron.studies.cell import is_done, read_result
        from sparsecod_megatron.studies.cost import plan_text

        done = {cell.name: cell.directory for cell in study.cells if is_done(study, cell)} | shared
        print(plan_text(study, {name: read_result(folder)["metrics"] for name, folder in done.items()}), end="")
        return
    take_over(study, shared)
    for name, folder in shared.items():
        print(f"{name}: taken from {folder}")
    if args.submit:
        _submit(study, command)
    else:
        if not args.table:
            _run_cells(study, command)
        _write(study, command)


def _run_cells(study: Study, command: list[str]) -> None:
    from tqdm import tqdm

    from sparsecod_megatron.studies.cell import unfinished
    from sparsecod_megatron.studies.runner import Runner

    cells, failed = unfinished(study), []
    runner = Runner(study, command)
    with tqdm(total=len(study.cells), initial=len(study.cells) - len(cells), unit="cell", disable=None) as bar:
        for outcome in runner.run(cells):
            bar.update()
            bar.write(_told(outcome))
            if outcome.status:
                failed.append(outcome)
    if runner.stopped_by is not None:
        raise Stopped(runner.stopped_by, "once the running cells had saved; the same command resumes")
    if failed:
        _write(study, command)
        raise RanksFailed(f"{len(failed)} of {len(cells)} cells failed, the first: {failed[0].last_words}")


def _told(outcome: Outcome) -> str:
    if not outcome.status:
        return f"{outcome.cell.name}: done"
    return f"{outcome.cell.name}: failed with status {outcome.status}; see {outcome.log}"


def _submit(study: Study, command: list[str]) -> None:
    from sparsecod_megatron.studies.cell import unfinished
    from sparsecod_megatron.studies.slurm import submit, write_jobs

    cells = unfinished(study)
    script = write_jobs(study, cells, command)
    jobs = submit(script)
    print(f"submitted {len(cells)} cells with {script}: jobs {', '.join(jobs)}")


def _write(study: Study, command: list[str], kept: Path | None = None) -> None:
    from sparsecod_megatron.studies.figures import draw_figures
    from sparsecod_megatron.studies.kept import kept_cells
    from sparsecod_megatron.studies.table import finished_cells, make_table, write_table

    table = make_table(study.config, finished_cells(study) if kept is None else kept_cells(study, kept))
    print(write_table(study, table, command=shlex.join(["sparsecod", *command])), end="")
    figures = draw_figures(study, table)
    print(f"wrote {study.output}/table.md, table.csv, table.json and {len(figures)} figures")
    if kept is not None:
        print("variance by depth is drawn from the runs, which are not kept; what is above needs none of them")
