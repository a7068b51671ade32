"""Every key a study's YAML may hold: a base run, a grid of changes to it, what is measured, and claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsecod_megatron.config.fields import TYPE_KEY, ValuesOf, at_least, choice
from sparsecod_megatron.config.schema import RunConfig

Labels = tuple[tuple[str, str], ...]
"""One setting of the grid: (axis, label) of every axis."""


@dataclass
class AxisConfig:
    """One direction of the grid: either values of one key, or named sets of changes."""

    name: str = "???"
    key: str | None = None
    """Key of the run's configuration that takes `values`."""
    values: list[Any] | None = field(default=None, metadata={TYPE_KEY: ValuesOf(RunConfig, named_by="key")})
    cells: dict[str, Any] | None = field(default=None, metadata={TYPE_KEY: dict[str, RunConfig]})
    """Label → changes of the run, as `a.b: c` or as sections."""


@dataclass
class BudgetConfig:
    """How long every cell trains."""

    tokens: int | None = at_least(1, None)
    """Training tokens of a cell (of the reference cell, where compute is matched); None trains the base's steps."""
    match: str = choice("tokens", "compute", "effective_compute")
    """What all cells have in common: the tokens, or the operations of the cell `reference`; `effective_compute` leaves
    out products with weights that a mechanism holds at zero, as hardware that skips them would."""
    reference: dict[str, str] = field(default_factory=dict)
    """Axis → label of the cell that spends `tokens`; axes left out are at their first label."""
    warmup_share: float | None = at_least(0, None)
    """Share of the steps that warms up; None keeps `schedule.lr_warmup_steps`."""


@dataclass
class ScoresConfig:
    """Depth scores and sparsity of every trained model, as `sparsecod analyze` computes them."""

    names: list[str] = field(
        default_factory=lambda: ["causal", "permutation", "usefulness", "jacobian", "skip", "lens"]
    )
    task: str | None = None
    """What `answers`, `integrated_gradients` and `token_skip` ask: `addition`, `hops`, a file of questions (relative to
    the folder that the command is run in), or `synthetic`, each cell's own `data.synthetic`."""
    difficulties: list[int] = field(default_factory=list)
    """Digits of `addition` or steps of `hops`; empty takes the task's own."""
    samples: int = at_least(2, 64)
    """Sequences of text, and questions of the task."""
    seq_length: int = at_least(1, 128)
    """Tokens of a sequence of text."""
    seed: int = at_least(0, 0)
    """Seed of the sample, the same for all cells, so that their scores can be compared."""
    memory_gib: float = at_least(0, 2.0)
    steps: int = at_least(0, 0)
    """Checkpoints of a cell that are scored, on held-out text too, the last among them; 0 scores the last alone."""
    spacing: str = choice("log", "linear")
    """How those steps lie: at equal factors from a hundredth of the run, or at equal differences."""


@dataclass
class HeldOutConfig:
    """Held-out text and lm-eval tasks, as `sparsecod eval` scores them."""

    windows: int | None = at_least(1, None)
    """Windows of validation text, each as long as the cell's training sequences; None scores the whole text."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks or groups; `paper` stands for the paper's."""
    include_path: str | None = None
    """Folder with more task YAML files."""
    limit: int | None = at_least(1, None)
    """Questions per task."""
    batch_size: int = at_least(1, 8)


@dataclass
class SlurmConfig:
    """How `--submit slurm` asks for a cell's nodes."""

    nodes: int = at_least(1, 1)
    script: str = "examples/slurm/train.sbatch"
    """Job script of a training, given the cell's config.yaml; relative to the folder that the command is run in."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch for the training, such as `--time=12:00:00`."""
    score_options: list[str] = field(default_factory=lambda: ["--nodes=1", "--ntasks=1", "--gpus=1", "--time=04:00:00"])
    """Options of sbatch for the job that scores the trained cell."""


@dataclass
class LaunchConfig:
    """Where cells run, and what the plan assumes."""

    slots: int = at_least(1, 1)
    """Cells run at a time on this machine; processors and GPUs are shared out among them."""
    nproc: int = at_least(1, 1)
    """Training processes of a cell."""
    gpu: str = choice("none", "h100", "h200")
    """Device that the plan's hours are for; `none` is a processor of `gflops`."""
    gflops: float = at_least(0, 20.0)
    """Operations per second (10^9) that a slot without GPU sustains."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class ClaimConfig:
    """Something that the table decides: a metric higher at one place of the grid than at another, or a trend."""

    text: str = "???"
    metric: str = "???"
    higher: dict[str, str] = field(default_factory=dict)
    """Axis → label of the place where the metric is said to be higher."""
    lower: dict[str, str] = field(default_factory=dict)
    rises_along: str | None = None
    """Axis along which the metric is said to rise, from label to label."""
    falls_along: str | None = None
    published: str = ""
    """The numbers that the claim was made with."""


@dataclass
class ScatterConfig:
    """A figure of one metric by another: a point for every place of the grid."""

    across: str = "???"
    up: str = "???"


@dataclass
class LawConfig:
    """A scaling law fitted to the cells, each of which is a point."""

    law: str = "???"
    """A name of docs/LAWS.md."""
    x: list[str] = field(default_factory=list)
    """Metrics, or axes with numbers for labels, of the law's variables, in its order."""
    y: str = "???"
    """Metric that the law is of."""
    where: dict[str, str] = field(default_factory=dict)
    """Axis → label of the cells to take; empty takes all."""
    over: str = choice("cells", "checkpoints")
    """Points: trained cells, or all checkpoints of them that `scores.steps` scores, each cell one run."""


@dataclass
class StudyConfig:
    """One study."""

    name: str = "???"
    question: str = "???"
    base: str = "???"
    """Run configuration that all cells start from; relative to the study's file."""
    run: dict[str, Any] = field(default_factory=dict, metadata={TYPE_KEY: RunConfig})
    """Changes of the base in all cells, as `a.b: c` or as sections; `grid` wins over them."""
    grid: list[AxisConfig] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Values of `train.seed`: initial weights and order of the data."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    columns: list[str] = field(
        default_factory=lambda: [
            "perplexity",
            "out_var_last",
            "out_var_growth",
            "causal/causal",
            "permutation/permutation",
            "usefulness/useful_share",
            "usefulness/mean_log_usefulness",
            "jacobian/jacobian_deviation",
        ]
    )
    """Metrics of the table and the figures, after parameters and tokens."""
    scatter: list[ScatterConfig] = field(default_factory=list)
    claims: list[ClaimConfig] = field(default_factory=list)
    laws: list[LawConfig] = field(default_factory=list)
    verify: bool = True
    """Compare the logits of every cell's export with Megatron's before it is scored."""
    keep_checkpoints: bool = True
    """Keep a cell's training checkpoints once it is exported."""


def setting_name(labels: Labels) -> str:
    """`axis=label,…`."""
    return ",".join(f"{axis}={label}" for axis, label in labels)
