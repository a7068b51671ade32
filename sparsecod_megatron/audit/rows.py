"""What an audit compares: every small layout that the model allows, with each mechanism that has gone wrong before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sparsecod_megatron.config import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig, check_config
from sparsecod_megatron.config import data_parallel_size as checked_data_parallel_size
from sparsecod_megatron.config.check_megatron import without_effect
from sparsecod_megatron.errors import ConfigError

BUCKETS = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20_000}
"""What CUDA runs by default, with buckets so small that the model has many, and padding in them."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
KINDS_ON_FOUR = ("plain", "overlap", "resume")
"""Rows of layouts of four processes, which combine what layouts of two have shown."""
MECHANISMS = ("plain", "overlap", "recompute", "micro-batch", "resume", "resume-as-dp", "validation")
"""How a layout is stepped: as it is; with bucketed gradients and overlap (`BUCKETS`), as are all below that save; with
recompute; with half the micro-batch; from a checkpoint in the middle, in this layout and as pure data parallelism; and
with a validation in the middle."""


@dataclass(frozen=True)
class Layout:
    """How the small model is spread.

    Attributes:
        name: in the table.
        nproc: number of processes.
        parallel: the configuration's section.
    """

    name: str
    nproc: int
    parallel: ParallelConfig


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        layout: layout of the processes.
        mechanism: one of `MECHANISMS`.
        precision: `fp32`, or the run's own.
        against: name of the row it must equal; None for a reference.
        exact: whether it must equal it bit for bit: the same layout, the same arithmetic.
    """

    layout: Layout
    mechanism: str
    precision: str
    against: str | None
    exact: bool = False

    @property
    def name(self) -> str:
        """Shown in the table, unique."""
        parts = (self.layout.name, *((self.mechanism,) if self.mechanism != "plain" else ()))
        return " ".join((*parts, *((self.precision,) if self.precision != "fp32" else ())))

    def config(self, small: RunConfig) -> RunConfig:
        """The small run as this row steps it."""
        train, megatron = small.train, dict(small.megatron)
        if self.mechanism in ("overlap", "resume", "resume-as-dp"):
            # Muon's optimizer is not distributed: there is nothing to gather.
            gathered = small.optimizer.optimizer != "muon"
            megatron |= BUCKETS | {"overlap_param_gather": gathered}
        if self.mechanism == "recompute":
            megatron |= RECOMPUTE
        if self.mechanism == "micro-batch":
            train = replace(train, micro_batch_size=1)
        precision = PrecisionConfig(dtype="fp32") if self.precision == "fp32" else small.precision
        config = replace(small, parallel=self.layout.parallel, train=train, megatron=megatron, precision=precision)
        # What has a meaning in the run need not have one in this layout and precision (FP8's fields, DeepEP's).
        while unread := without_effect(config):
            config = replace(config, megatron={key: megatron[key] for key in config.megatron if key not in unread})
        return config


@dataclass(frozen=True)
class Plan:
    """What an audit does.

    Attributes:
        rows: in the order they run; a reference stands before the rows that are compared with it.
        left_out: name of a layout or mechanism → why this model does not have it.
    """

    rows: list[Row]
    left_out: dict[str, str]


REFERENCE = Layout("1 process", 1, ParallelConfig())


def plan_rows(small: RunConfig, *, nproc: int, only: list[str] | None = None) -> Plan:
    """The rows of a small run. Local.

    Args:
        small: from `small_run`.
        nproc: most processes of a row.
        only: patterns of the names of rows to keep; rows that these are compared with stay.

    Raises:
        ConfigError: the small model cannot be built, or no row has such a name.
    """
    left_out: dict[str, str] = {}
    layouts = [layout for layout in _layouts(small.model, nproc) if _allowed(layout, small, left_out)]
    if REFERENCE not in layouts:
        raise ConfigError(f"the small model cannot be built: {left_out[REFERENCE.name]}")
    own = "fp8" if small.precision.fp8 else small.precision.dtype
    rows = [row for layout in layouts for row in _rows_of(layout, small.model, left_out)]
    if own != "fp32":
        rows += [
            Row(layout, *mechanism)
            for layout in layouts
            if layout.nproc < 4
            for mechanism in (
                ("plain", own, None if layout is REFERENCE else f"{REFERENCE.name} {own}"),
                ("overlap", own, f"{layout.name} {own}"),
                ("resume", own, f"{layout.name} overlap {own}", True),
            )
        ]
    rows.sort(key=lambda row: row.layout.nproc)
    return Plan(_chosen(rows, only) if only else rows, left_out)


def _chosen(rows: list[Row], only: list[str]) -> list[Row]:
    wanted = [row.name for row in rows if any(fnmatchcase(row.name, pattern) for pattern in only)]
    if not wanted:
        some = ", ".join(repr(row.name) for row in rows[1:4])
        raise ConfigError(f"--only {' '.join(only)}: no row has this name; rows are e.g. {some}, and * stands for any")
    return with_references(rows, wanted)


def with_references(rows: Sequence[Row], names: Iterable[str]) -> list[Row]:
    """The rows of these names, and those that they are compared with, in their order. Local."""
    references = {row.name: row.against for row in rows}
    wanted: set[str] = set()
    for name in names:
        link: str | None = name
        while link is not None:
            wanted.add(link)
            link = references[link]
    return [row for row in rows if row.name in wanted]


def _rows_of(layout: Layout, model: ModelConfig, left_out: dict[str, str]) -> Iterator[Row]:
    for mechanism in MECHANISMS if layout.nproc < 4 else KINDS_ON_FOUR:
        against: str | None = layout.name
        exact = False
        if mechanism == "plain":
            against = None if layout is REFERENCE else REFERENCE.name
        elif mechanism == "micro-batch":
            by_micro_batch = _depends_on_micro_batch(model)
            if by_micro_batch:
                left_out["1 process micro-batch against 1 process"] = by_micro_batch
            against = (
                f"{REFERENCE.name} micro-batch"
                if layout is not REFERENCE
                else None
                if by_micro_batch
                else REFERENCE.name
            )
        elif mechanism == "resume":
            against, exact = f"{layout.name} overlap", True
        elif mechanism == "resume-as-dp":
            if layout.nproc == 1 or layout.parallel == REFERENCE.parallel:
                continue
            against = REFERENCE.name
        elif mechanism == "validation":
            exact = True
        yield Row(layout, mechanism, "fp32", against, exact)


def _depends_on_micro_batch(model: ModelConfig) -> str | None:
    """Why the small model trains otherwise with another micro-batch; None where it does not."""
    if not model.is_moe:
        return None
    if model.moe_expert_capacity_factor is not None:
        return "model.moe_expert_capacity_factor is of a micro-batch"
    if model.moe_router_load_balancing_type == "aux_loss" and model.moe_aux_loss_coeff:
        return "model.moe_router_load_balancing_type=aux_loss balances each micro-batch"
    return None


def _allowed(layout: Layout, small: RunConfig, left_out: dict[str, str]) -> bool:
    tried = Row(layout, "plain", "fp32", None).config(small)
    parallel = layout.parallel
    divides_tokens = parallel.sequence_parallel or parallel.context_parallel_size > 1
    if divides_tokens and small.model.is_moe and small.model.moe_expert_capacity_factor is not None:
        left_out[layout.name] = "model.moe_expert_capacity_factor is of one rank's tokens, which the layout divides"
        return False
    try:
        check_config(tried)
        checked_data_parallel_size(tried, layout.nproc)
    except ConfigError as error:
        left_out[layout.name] = str(error)
        return False
    return True


def _layouts(model: ModelConfig, nproc: int) -> Iterator[Layout]:
    """Layouts of one, two and four processes; sizes are 1 or 2, so that every kind and every pair of kinds occurs."""
    for layout in (REFERENCE, *(_moe_layouts() if model.is_moe else _dense_layouts()), *_common_layouts(model.is_moe)):
        if layout.nproc <= nproc:
            yield layout


def _common_layouts(moe: bool) -> Iterator[Layout]:
    tensor = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    pipeline = ParallelConfig(pipeline_model_parallel_size=2)
    virtual = replace(pipeline, virtual_pipeline_model_parallel_size=2)
    context = ParallelConfig(context_parallel_size=2)
    yield Layout("dp2", 2, ParallelConfig())
    yield Layout("tp2+sp", 2, tensor)
    yield Layout("pp2", 2, pipeline)
    yield Layout("pp2 vpp2", 2, virtual)
    yield Layout("cp2", 2, context)
    yield Layout("dp4", 4, ParallelConfig())
    yield Layout("dp2 tp2+sp", 4, tensor)
    yield Layout("dp2 pp2", 4, pipeline)
    if moe:
        return
    yield Layout("dp2 pp2 vpp2", 4, virtual)
    yield Layout("dp2 cp2", 4, context)
    yield Layout("tp2+sp pp2", 4, replace(tensor, pipeline_model_parallel_size=2))
    yield Layout("tp2+sp cp2", 4, replace(tensor, context_parallel_size=2))
    yield Layout("pp2 cp2", 4, replace(pipeline, context_parallel_size=2))


def _dense_layouts() -> Iterator[Layout]:
    yield Layout("tp2", 2, ParallelConfig(tensor_model_parallel_size=2))


def _moe_layouts() -> Iterator[Layout]:
    experts = ParallelConfig(expert_model_parallel_size=2)
    tensor = replace(experts, tensor_model_parallel_size=2, sequence_parallel=True)
    yield Layout("ep2", 2, experts)
    yield Layout("ep2 tp2+sp etp1", 2, replace(tensor, expert_tensor_parallel_size=1))
    yield Layout("ep2 cp2", 2, replace(experts, context_parallel_size=2))
    yield Layout("dp2 ep2", 4, experts)
    yield Layout("ep2 tp2+sp", 4, tensor)
    yield Layout("ep2 pp2", 4, replace(experts, pipeline_model_parallel_size=2))
    yield Layout("ep4", 4, ParallelConfig(expert_model_parallel_size=4))
