"""Audits a dense and a MoE run: rows as they are, and copies of some with a fault planted. Started by torchrun.

Arguments: a folder for checkpoints, then the JSON file to write: {run: {row: verdict}}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from sparsecod_megatron.audit.rows import Row, plan_rows
from sparsecod_megatron.audit.small import small_run
from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import RunConfig, load_config

Fault = Callable[[RunConfig], AbstractContextManager[None]]


@contextlib.contextmanager
def padding_counted(small: RunConfig) -> Iterator[None]:
    """Offsets into the optimizer's gathered state as upstream has them."""
    with patch("sparsecod_megatron.checkpoint.optimizer_state.places_without_padding", contextlib.nullcontext):
        yield


@contextlib.contextmanager
def weights_not_gathered(small: RunConfig) -> Iterator[None]:
    """A save writes what the next forward pass would still have replaced."""
    with patch("sparsecod_megatron.checkpoint.native.gather_weights", lambda models: None):
        yield


@contextlib.contextmanager
def weaker_balance(small: RunConfig) -> Iterator[None]:
    """The loss of all data-parallel ranks divided by their number once more, as upstream does."""
    from megatron.core.transformer.moe.router import TopKRouter

    whole = TopKRouter.get_aux_loss_coeff

    def divided(self: Any, kind: str) -> float:
        return whole(self, kind) / dist.get_world_size()

    with patch.object(TopKRouter, "get_aux_loss_coeff", divided):
        yield


@contextlib.contextmanager
def unmarked_experts(small: RunConfig) -> Iterator[None]:
    """Experts without the attribute, as Transformer Engine's layers leave them."""
    from sparsecod_megatron.train import setup

    build = setup.build_model

    def unmarked(*args: Any, **kwargs: Any) -> Any:
        models = build(*args, **kwargs)
        for model in models:
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.tensor_model_parallel = False
        return models

    with patch.object(setup, "build_model", unmarked):
        yield


@contextlib.contextmanager
def validation_counted(small: RunConfig) -> Iterator[None]:
    """As upstream has it: autograd stays on, so that routers count a validation's tokens, and nothing is put back."""
    from sparsecod_megatron.audit import measure
    from sparsecod_megatron.train.unchanged import KeptBuffers

    evaluate = measure.evaluate

    def counted(*args: Any, **kwargs: Any) -> float:
        autograd = patch.object(torch, "set_grad_enabled", lambda enabled: contextlib.nullcontext())
        with autograd, patch.object(KeptBuffers, "restore", lambda self: None):
            return evaluate(*args, **kwargs)

    with patch.object(measure, "evaluate", counted):
        yield


@contextlib.contextmanager
def failing_rank(small: RunConfig) -> Iterator[None]:
    """The second process raises after a step in which the first does not."""
    from sparsecod_megatron.audit import measure

    step = measure.train_step

    def failing(*args: Any) -> Any:
        result = step(*args)
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return result

    with patch.object(measure, "train_step", failing):
        yield


@contextlib.contextmanager
def tie(small: RunConfig) -> Iterator[None]:
    """The first seed's losses alone differ."""
    from sparsecod_megatron.audit import measure

    step, first_seed = measure.train_step, load_config(None, DENSE).train.seed

    def other(*args: Any) -> Any:
        result = step(*args)
        return replace(result, loss=result.loss + 1) if small.train.seed == first_seed else result

    with patch.object(measure, "train_step", other):
        yield


@dataclass(frozen=True)
class Run:
    """An audit.

    Attributes:
        overrides: of the configuration.
        only: rows.
        planted: name of a copy's layout → the row it is a copy of, and its fault.
        twice: whether what is red is measured again with another seed.
    """

    overrides: tuple[str, ...]
    only: tuple[str, ...]
    planted: dict[str, tuple[str, Fault]]
    twice: bool = False


DENSE = ("precision.dtype=bf16",)
MOE = (
    "precision.dtype=fp32",
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_bias_update_rate=0.05",
    "model.moe_router_load_balancing_type=global_aux_loss",
)
RUNS = {
    "dense": Run(
        DENSE,
        ("dp2 resume bf16", "pp2"),
        {
            "one rank fails:": ("dp2 bf16", failing_rank),
            "padding counted:": ("dp2 resume bf16", padding_counted),
            "weights not gathered:": ("dp2 resume bf16", weights_not_gathered),
        },
    ),
    "experts": Run(
        MOE,
        ("ep2", "tp2+sp", "dp2 validation"),
        {
            "weaker balance:": ("dp2", weaker_balance),
            "unmarked experts:": ("tp2+sp", unmarked_experts),
            "validation counted:": ("dp2 validation", validation_counted),
        },
    ),
    "tie": Run(DENSE, ("1 process recompute",), {"tie:": ("1 process recompute", tie)}, twice=True),
}


def rows_of(run: Run, small: RunConfig) -> list[Row]:
    """The right rows, and each copy behind the row that it is a copy of."""
    rows = []
    for row in plan_rows(small, nproc=2, only=list(run.only)).rows:
        rows.append(row)
        for name, (original, _) in run.planted.items():
            if row.name == original:
                layout = replace(row.layout, name=f"{name} {row.layout.name}")
                rows.append(replace(row, layout=layout, against=row.against))
    return rows


def main() -> None:
    """Write the file from rank 0."""
    folder, output = map(Path, sys.argv[1:])
    backend = select_backend()
    from sparsecod_megatron.audit import ranks

    processes, found, measure = ranks.started_processes(), {}, ranks.measure
    for name, run in RUNS.items():
        small = small_run(load_config(None, run.overrides), capability=None).config

        def planted(row: Row, small: RunConfig, *args: Any, run: Run = run) -> Any:
            fault = next((fault for start, (_, fault) in run.planted.items() if row.name.startswith(start)), None)
            with contextlib.nullcontext() if fault is None else fault(small):
                return measure(row, small, *args)

        own = replace(processes, store=dist.PrefixStore(name, processes.store))
        judge = ranks.audit_rows if run.twice else ranks.run_rows
        with patch.object(ranks, "measure", planted):
            verdicts = judge(own, rows_of(run, small), small, backend, folder / name)
        found[name] = {verdict.row: verdict.json() for verdict in verdicts}
    if processes.rank == 0:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
