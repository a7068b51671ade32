"""Norms of real optimizer steps against the same norms read from the model's own tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.training import collected_steps, small_trainer, trainer_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares with fp32 arithmetic on the CPU")

MOE = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24", "model.moe_shared_expert_intermediate_size=24")
TIED = ("model.untie_embeddings_and_output_weights=false",)
BF16 = "precision.dtype=bf16"


@contextlib.contextmanager
def training(*overrides: str) -> Iterator[tuple[Any, Any, list[Any]]]:
    """(trainer, its norms group, its layers)."""
    with small_trainer(*overrides) as trainer:
        from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
        from sparsecod_megatron.model import unwrap

        models = [unwrap(model) for model in trainer.models]
        yield trainer, ParameterNormsGroup(models, trainer.optimizer), list(models[0].decoder.layers)


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("model", [(), MOE, TIED], ids=["dense", "moe", "tied"])
def test_gradients_add_up_to_the_global_norm(model: tuple[str, ...]) -> None:
    """Without clipping the buffers still hold the gradient after the step: per layer, and with the rest in total."""
    from sparsecod_megatron.train.step import train_step

    with training(*model, "optimizer.clip_grad=0") as (trainer, group, layers):
        [statistics] = collected_steps(trainer, [group], steps=1)
        ours = [layer["grad_norm"] for layer in statistics]
        assert ours == pytest.approx([norm([p.main_grad for p in layer.parameters()]) for layer in layers], rel=1e-6)
        in_layers = {parameter for layer in layers for parameter in layer.parameters()}
        rest = [p.main_grad for p in trainer.models[0].parameters() if p not in in_layers]
        total = math.hypot(*ours, norm(rest))
    with training(*model, "optimizer.clip_grad=0") as (trainer, _, _):
        assert total == pytest.approx(train_step(trainer, trainer_batches(trainer)).grad_norm, rel=1e-6)


def test_gradients_are_those_before_clipping() -> None:
    collected = []
    for clip in (0.0, 1e-4):
        with training(f"optimizer.clip_grad={clip}") as (trainer, group, layers):
            [statistics] = collected_steps(trainer, [group], steps=1)
            left = norm([parameter.main_grad for parameter in layers[0].parameters()])
            collected.append(([layer["grad_norm"] for layer in statistics], left))
    (unclipped, left_unclipped), (clipped, left_clipped) = collected
    assert clipped == pytest.approx(unclipped, rel=1e-6)
    assert left_clipped < 1e-2 * left_unclipped


def weights(layers: list[Any], dtype: str) -> list[list[Tensor]]:
    """Copies of each layer's weights as the optimizer has them; in one process its slice is the whole parameter."""
    masters = "main_param" if dtype == "bf16" else "data"
    return [[getattr(parameter, masters).detach().clone() for parameter in layer.parameters()] for layer in layers]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [(), MOE], ids=["dense", "moe"])
def test_update_ratio_is_that_of_the_weights(model: tuple[str, ...], dtype: str) -> None:
    """Three steps, with clipping, weight decay and a schedule: what the weights did, not what the gradient suggests."""
    settings = (f"precision.dtype={dtype}", "optimizer.clip_grad=0.1", "optimizer.weight_decay=0.5")
    with training(*model, *settings) as (trainer, group, layers):
        snapshots = [weights(layers, dtype)]

        def remember(*_: Any) -> None:
            snapshots.append(weights(layers, dtype))

        for part in trainer.optimizer.chained_optimizers:
            part.optimizer.register_step_post_hook(remember)
        steps = collected_steps(trainer, [group], steps=3)
        assert len(snapshots) == 4
    for step, statistics in enumerate(steps):
        for layer, values in enumerate(statistics):
            before, after = snapshots[step][layer], snapshots[step + 1][layer]
            assert values["param_norm"] == pytest.approx(norm(before), rel=1e-6)
            change = norm([new - old for new, old in zip(after, before, strict=True)])
            assert change > 0
            assert values["update_ratio"] == pytest.approx(change / norm(before), rel=1e-5)


def test_an_update_that_bf16_rounds_away_counts() -> None:
    with training(BF16, "optimizer.lr=1e-6", "optimizer.weight_decay=0") as (trainer, group, layers):
        matrix = layers[0].self_attention.linear_proj.weight
        before = matrix.detach().clone()
        [statistics] = collected_steps(trainer, [group], steps=1)
        unchanged = (matrix == before).float().mean()
    assert unchanged > 0.9
    # Adam's first step is ± lr for every element.
    parameters = list(layers[0].parameters())
    expected = 1e-6 * math.sqrt(sum(parameter.numel() for parameter in parameters)) / norm(parameters)
    assert statistics[0]["update_ratio"] == pytest.approx(expected, rel=0.02)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails: bool) -> None:
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.train.step import train_step

    with training() as (trainer, group, _):
        finalize = trainer.megatron.finalize_model_grads_func
        sums = LayerAccumulator(num_layers=3, names=group.names, device=torch.device("cpu"))
        with contextlib.suppress(_Stopped), group.collecting(sums):
            assert trainer.megatron.finalize_model_grads_func is not finalize
            if fails:
                raise _Stopped
            train_step(trainer, trainer_batches(trainer))
        assert trainer.megatron.finalize_model_grads_func is finalize
        for part in trainer.optimizer.chained_optimizers:
            assert not part.optimizer._optimizer_step_pre_hooks and not part.optimizer._optimizer_step_post_hooks
        collected = sums.reduce()
        assert [sorted(layer) for layer in collected] == [[] if fails else sorted(group.names)] * 3
        train_step(trainer, trainer_batches(trainer))
        assert sums.reduce() == collected
