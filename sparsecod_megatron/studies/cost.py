"""What a study will take, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsecod_megatron.planning import GPUS, make_plan, require_fit
from sparsecod_megatron.planning.vocabulary import with_vocabulary
from sparsecod_megatron.studies.grid import Cell, Study
from sparsecod_megatron.studies.metrics import cell_sizes
from sparsecod_megatron.studies.table import SIZE_COLUMNS, amount, markdown_grid


@dataclass(frozen=True)
class Cost:
    """Cost of one cell's training.

    Attributes:
        sizes: parameters, tokens and operations (`SIZES` of metrics.py).
        steps: optimizer steps.
        hours: best and worst case.
        gpus: that it holds; 0 on a processor.
    """

    sizes: dict[str, float]
    steps: int
    hours: tuple[float, float]
    gpus: int


def cell_cost(study: Study, cell: Cell) -> Cost:
    """Estimate a cell: on GPUs by `sparsecod plan`'s step time, on a processor by `launch.gflops`.

    Raises:
        ConfigError: a layout that cannot run on its GPUs, or does not fit them.
    """
    launch, sizes = study.config.launch, cell_sizes(cell.config)
    if launch.gpu == "none":
        hours = sizes["train_flops"] / (launch.gflops * 1e9) / 3600
        return Cost(sizes, cell.config.train.train_steps, (hours, hours), 0)
    gpus = launch.slurm.nodes * launch.nproc
    config, _ = with_vocabulary(cell.config)
    plan = make_plan(config, gpus, GPUS[launch.gpu])
    require_fit(plan)
    seconds = plan.time.seconds
    steps = cell.config.train.train_steps
    return Cost(sizes, steps, (steps * seconds.best / 3600, steps * seconds.worst / 3600), gpus)


def plan_text(study: Study, done: Mapping[str, Mapping[str, float | None]]) -> str:
    """The plan as a table: every cell, what it takes, and the sum of what is left, also at the speed of what is done.

    Args:
        study: the study.
        done: metrics of the cells that have their result, by name; none of a training that diverged.

    Raises:
        ConfigError: a cell that cannot run.
    """
    rows, left = [], [0.0, 0.0]
    costs = {cell.name: cell_cost(study, cell) for cell in study.cells}
    for name, cost in costs.items():
        sizes = cost.sizes
        counts = [amount(sizes[key]) for key in SIZE_COLUMNS]
        rows.append(
            [name, *counts, f"{cost.steps:,}", f"{sizes['train_flops']:.3g}", _hours(*cost.hours)]
            + (["done"] if name in done else [""])
        )
        if name not in done:
            left = [total + hours for total, hours in zip(left, cost.hours, strict=True)]
    header = ["cell", "parameters", "active", "tokens", "steps", "FLOPs", "hours", ""]
    waiting = len(costs) - len(done)
    gpus = next(iter(costs.values())).gpus
    work = f"{_hours(*(hours * gpus for hours in left))} GPU-hours" if gpus else f"{_hours(*left)} hours of one slot"
    slots = study.config.launch.slots
    summary = f"{waiting} of {len(costs)} cells to run, {slots} at a time: {work}, training alone"
    if waiting and (ratio := _measured_ratio(costs, done)):
        summary += f"; {left[0] * ratio * max(gpus, 1):.3g} at the speed of those that are done"
    return f"{markdown_grid(header, rows)}\n{summary}\n"


def _measured_ratio(costs: Mapping[str, Cost], done: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """Hours that the finished cells' steps took ÷ those of the best case; None where no speed was measured."""
    took = estimated = 0.0
    for name, metrics in done.items():
        if speed := metrics.get("tokens_per_s"):
            took += costs[name].sizes["tokens"] / speed / 3600
            estimated += costs[name].hours[0]
    return took / estimated if estimated else None


def _hours(best: float, worst: float) -> str:
    return f"{best:.3g}" if best == worst else f"{best:.3g}–{worst:.3g}"
