"""The share and the maximum of g² / v̂ against the optimizer's own tensors, parameter by parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.training import collected_steps, small_trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares with fp32 arithmetic on the CPU")

MOE = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24", "model.moe_shared_expert_intermediate_size=24")


def group_of(trainer: Any) -> Any:
    from sparsecod_megatron.metrics.gradient_spikes import GradientSpikesGroup
    from sparsecod_megatron.model import unwrap

    return GradientSpikesGroup([unwrap(model) for model in trainer.models], trainer.optimizer)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [(), MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_against_the_recurrence(model: tuple[str, ...], dtype: str, clip: float) -> None:
    """v of every parameter followed from the gradients alone, in fp64, through eight steps."""
    beta, steps = 0.95, 8
    with small_trainer(*model, f"precision.dtype={dtype}", f"optimizer.clip_grad={clip}") as trainer:
        layers = [list(layer.parameters()) for layer in trainer.models[0].module.modules() if _is_layer(layer)]
        moments: dict[Any, torch.Tensor] = {}
        expected: list[list[tuple[float, float]]] = []

        def follow(*_: Any) -> None:
            rows = []
            for parameters in layers:
                above, known, largest = 0, 0, 0.0
                for parameter in parameters:
                    master = getattr(parameter, "main_param", parameter) if dtype == "bf16" else parameter
                    gradient = _gradient(trainer, master).double().flatten()
                    second = moments.get(parameter)
                    if second is not None:
                        ratio = gradient.square() / (second / (1 - beta ** len(expected)))
                        has = second > 1e-40
                        above += int((ratio[has] > 50).sum())
                        known += int(has.sum())
                        largest = max(largest, float(ratio[has].max()) if has.any() else 0.0)
                    old = torch.zeros_like(gradient) if second is None else second
                    moments[parameter] = beta * old + (1 - beta) * gradient.square()
                rows.append((above / known if known else 0.0, largest))
            expected.append(rows)

        trainer.optimizer.chained_optimizers[0].optimizer.register_step_pre_hook(follow)
        found = collected_steps(trainer, [group_of(trainer)], steps=steps)
    assert found[0] == [{}] * len(layers)
    assert max(share for rows in expected for share, _ in rows) > 0, "no element spikes: the test sees nothing"
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        for statistics, (share, largest) in zip(ours, theirs, strict=True):
            assert statistics["spike_frac"] == pytest.approx(share, rel=0.02, abs=1e-4)
            assert statistics["spike_max"] == pytest.approx(largest, rel=1e-3)


def _is_layer(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("TransformerLayer") or hasattr(module, "self_attention")


def _gradient(trainer: Any, master: torch.Tensor) -> torch.Tensor:
    """What Adam is about to take for this parameter; in one process its slice is the whole of it."""
    optimizer = trainer.optimizer.chained_optimizers[0].optimizer
    for group in optimizer.param_groups:
        for candidate in group["params"]:
            if candidate.data_ptr() == master.data_ptr():
                return candidate.grad
    raise AssertionError("the optimizer steps no such tensor")


def test_after_the_update_nothing_could_exceed_the_bound() -> None:
    """Why the moment is the one before: 1 / (1 − β₂) = 20 bounds the other, and real spikes lie far above."""
    with small_trainer() as trainer:
        found = collected_steps(trainer, [group_of(trainer)], steps=6)
    assert max(layer["spike_max"] for layers in found[1:] for layer in layers) > 1000


def test_nothing_stays_behind() -> None:
    with small_trainer() as trainer:
        collected_steps(trainer, [group_of(trainer)], steps=1)
        assert not trainer.optimizer.chained_optimizers[0].optimizer._optimizer_step_pre_hooks
