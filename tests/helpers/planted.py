"""A linear student of a teacher with known live weights, trained by the engine's real plugins and torch's AdamW."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend.adamw import FusedAdam
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.weights.engine import marks, window
from sparsecod_megatron.mechanisms.weights.engine.places import Piece, Places
from sparsecod_megatron.seams.plugin import Plugin, StepContext, effective_weights
from tests.helpers.megatron import SMALL

OUT, IN = 32, 48
"""Sizes of the small model's MLP output."""


class OneMatrix(Places):
    """The places of a single matrix, which stands for the MLP output of the first layer."""

    def __init__(self, parts: Any, has_mask: Any, marks: Any) -> None:
        from sparsecod_megatron.mechanisms.weights.engine.places import marked_matrices

        self.matrices = marked_matrices(ParameterTable.of(parts.config), has_mask)
        assert [matrix.row.shape for matrix in self.matrices] == [(OUT, IN)]
        weight, row = parts.models, self.matrices[0].row
        matrix = SimpleNamespace(name="planted", layer=0)
        shard: Any = SimpleNamespace(parameter=weight, matrix=matrix, row=row, cut=lambda whole: whole)
        self.shards, self.device, self.groups = [(0, shard)], weight.device, parts.groups
        flat, marked = weight.detach().view(-1), torch.zeros(weight.numel(), dtype=torch.bool)
        self.pieces = [Piece(shard, 0, flat, (0, weight.numel()), parts.optimizer, weight, marked)]


def trained_student(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], teacher: Tensor, *, steps: int, seed: int
) -> tuple[Tensor, Tensor, Plugin]:
    """Weights that the student computes with, its latent weights, and the plugin, after so many steps of full batches.

    Args:
        monkeypatch: puts the one matrix in place of a model's.
        overrides: that switch one mechanism on.
        teacher: [OUT, IN].
        steps: of AdamW.
        seed: of weights, masks and inputs.
    """
    monkeypatch.setattr(marks, "Places", OneMatrix)
    monkeypatch.setattr(window, "Places", OneMatrix)
    (name,) = {override.split(".")[1] for override in overrides}
    only = (f"mechanisms.{name}.kinds=[mlp_output]", f"mechanisms.{name}.skip_layers=[1,2]")
    config = load_config(None, [*SMALL, f"train.seed={seed}", *overrides, *only], mechanisms=MECHANISMS)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(0.1 * torch.randn(OUT, IN, generator=generator))
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    optimizer = FusedAdam([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    parts: Any = SimpleNamespace(config=config, models=weight, optimizer=optimizer, groups=None)
    plugin = config.mechanisms[name].plugin(parts)
    plugin.weights_replaced()
    inputs = torch.randn(512, IN, generator=generator)
    for step in range(1, steps + 1):
        context = StepContext(step, steps)
        with effective_weights([plugin], context):
            loss = torch.nn.functional.mse_loss(inputs @ weight.T, inputs @ teacher.T)
            (weight.main_grad,) = torch.autograd.grad(loss, weight)  # type: ignore[attr-defined]
        plugin.on_gradients(context)
        weight.grad = weight.main_grad  # type: ignore[attr-defined]
        optimizer.step()
        plugin.after_update(context, optimizer)
        plugin.step_ended(context, updated=True)
    with effective_weights([plugin], StepContext(steps, steps)):
        effective = weight.detach().clone()
    return effective, weight.detach().clone(), plugin


def planted_teacher(density: float, seed: int) -> Tensor:
    """[OUT, IN] with exact zeros, live weights well away from them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.zeros(OUT * IN)
    live = torch.randperm(OUT * IN, generator=generator)[: round(density * OUT * IN)]
    signs = torch.randint(2, (len(live),), generator=generator) * 2.0 - 1
    weight[live] = signs * (0.5 + torch.rand(len(live), generator=generator))
    return weight.view(OUT, IN)
