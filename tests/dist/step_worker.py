"""Trains with the whole step's balance in each layout, from the same fresh weights. Started with four ranks.

Argument: the JSON file to write: {layout: [[loss, gradient norm] by step]}.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from sparsecod_megatron.backend import Backend, choice, select_backend
from sparsecod_megatron.config import load_config
from tests.dist.layouts import CP2, EP2, ETP1, FULL_RECOMPUTE, PP2, SP, TP2, VPP2
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import trainer_batches

STEPS = 3
RUN = (
    *SMALL,
    "model.num_layers=4",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_router_load_balancing_type=global_aux_loss",
    "model.moe_aux_loss_coeff=1",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "optimizer.lr=1e-2",
    # Of the order of the gradient: with Adam's usual one, rounding noise would move elements by its sign.
    "optimizer.adam_eps=1e-3",
)
OVERLAP = (
    "megatron.overlap_grad_reduce=true",
    "megatron.overlap_param_gather=true",
    "megatron.bucket_size=2000",
)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp4": (),
    "dp4-mbs2": ("train.micro_batch_size=2",),
    "ep2-overlap": (EP2, *OVERLAP),
    "tp2-ep2": (TP2, SP, EP2),
    "tp2-ep2-etp1": (TP2, SP, EP2, ETP1),
    "cp2-recompute-overlap": (CP2, *FULL_RECOMPUTE, *OVERLAP),
    "pp2-vpp2-overlap": (PP2, VPP2, *OVERLAP),
}
LEFT_UNMARKED = ("tp2-ep2", "tp2-ep2-etp1")
"""Layouts that are trained again with linear layers that do not say that they are sharded."""


def series(backend: Backend, groups: Any, overrides: tuple[str, ...]) -> list[list[float]]:
    """[loss, gradient norm] by step. Collective over all processes."""
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    choice.use(choice.Choice(weight_gradient=dist.get_rank() > 0))
    trainer = build_trainer(load_config(None, [*RUN, *overrides]), backend, groups)
    assert trainer.products is not None and str(choice.in_use()) == trainer.products["onednn"] == "none"
    # Routers that overload some experts, so that the balance matters.
    for name, parameter in (named for model in trainer.models for named in model.named_parameters()):
        if name.endswith("router.weight"):
            parameter.data.mul_(torch.linspace(1, 20, 4)[:, None])
    trainer.optimizer.reload_model_params()
    data = trainer_batches(trainer)
    results = [train_step(trainer, data) for _ in range(STEPS)]
    return [[result.loss, result.grad_norm] for result in results]


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from megatron.core.tensor_parallel import layers

    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, sys.argv[1]) as collected:
        for name, overrides in LAYOUTS.items():
            with process_groups(load_config(None, [*RUN, *overrides])) as groups:
                collected[name] = series(backend, groups, overrides)
        layers.set_tensor_model_parallel_attributes = lambda *_, **__: None
        for name in LEFT_UNMARKED:
            with process_groups(load_config(None, [*RUN, *LAYOUTS[name]])) as groups:
                collected[f"{name}-unmarked"] = series(backend, groups, LAYOUTS[name])


if __name__ == "__main__":
    main()
