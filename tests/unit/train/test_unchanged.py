"""What trains nothing changes nothing: a validation, and a step whose update is left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers.training import small_trainer, trainer_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU runs bit for bit")

EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_bias_update_rate=0.1",
    "model.moe_router_load_balancing_type=global_aux_loss",
)
NOISE = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "megatron.moe_input_jitter_eps=0.1")


def losses(*overrides: str, validate: bool) -> tuple[list[float], list[float]]:
    """Training losses of three steps, and validation losses after each."""
    from sparsecod_megatron.train.step import evaluate, train_step

    with small_trainer(*EXPERTS, *NOISE, *overrides) as trainer:
        data, trained, validated = trainer_batches(trainer), [], []
        for _ in range(3):
            trained.append(train_step(trainer, data).loss)
            if validate:
                twice = [evaluate(trainer, trainer_batches(trainer, seed=9), num_steps=2) for _ in range(2)]
                assert twice[0] == twice[1], "validation is not noisy"
                validated.append(twice[0])
        return trained, validated


def test_a_bias_without_its_mean_chooses_as_with_it() -> None:
    from sparsecod_megatron.train.step import train_step

    runs = []
    for zero_mean in ("false", "true"):
        # Of three experts, moved up or down by the same, the mean moves.
        with small_trainer(
            *EXPERTS, "model.num_moe_experts=3", f"model.moe_router_bias_zero_mean={zero_mean}"
        ) as trainer:
            data = trainer_batches(trainer)
            found = [train_step(trainer, data).loss for _ in range(3)]
            biases = [value for name, value in trainer.models[0].named_buffers() if name.endswith("expert_bias")]
            runs.append((found, torch.stack(biases)))
    (plain, bias), (centred, without_mean) = runs
    assert plain == pytest.approx(centred, abs=1e-7)
    means = bias.mean(-1, keepdim=True)
    assert means.abs().max() > 0.02, "else there was nothing to take away"
    torch.testing.assert_close(without_mean, bias - means)


@pytest.mark.parametrize("overrides", [(), ("precision.dtype=bf16",)], ids=["fp32", "bf16"])
def test_losses_are_bit_equal_with_and_without_validation(overrides: tuple[str, ...]) -> None:
    with_validation, validated = losses(*overrides, validate=True)
    assert with_validation == losses(*overrides, validate=False)[0]
    assert validated[-1] != validated[0]


def test_validation_keeps_modes_buffers_and_no_activations() -> None:
    from sparsecod_megatron.train.step import evaluate, train_step

    with small_trainer(*EXPERTS, *NOISE) as trainer:
        model, data = trainer.models[0], trainer_batches(trainer)
        train_step(trainer, data)
        layer = model.module.decoder.layers[0].eval()
        state = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda it: it):
            evaluate(trainer, data, num_steps=1)
        assert not saved
        assert model.training and not layer.training
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("how", ["nan", "spike", "stop"])
def test_a_step_that_is_left_out_moves_nothing(how: str) -> None:
    """Weights, buffers, moments and Adam's count; the step after it is as if it had not been."""
    from sparsecod_megatron.train.divergence import DivergenceError, Verdict, require_finite
    from sparsecod_megatron.train.step import train_step

    with small_trainer(*EXPERTS) as trainer:
        data = trainer_batches(trainer)
        model, optimizer = trainer.models[0], trainer.optimizer.chained_optimizers[0].optimizer

        def state() -> list[torch.Tensor]:
            entries = (value for entry in optimizer.state.values() for value in entry.values())
            moments = [value for value in entries if torch.is_tensor(value)]
            counts = [torch.tensor(group["step"]) for group in optimizer.param_groups]
            named = (*model.named_parameters(), *model.named_buffers())
            return [tensor.detach().clone() for tensor in (*(tensor for _, tensor in named), *moments, *counts)]

        train_step(trainer, data)
        before = state()
        if how == "stop":
            with pytest.raises(DivergenceError):
                train_step(trainer, data, judge=lambda loss, norm: require_finite(math.nan, norm))
        else:
            verdict = Verdict(update=False, diverged=how == "nan", spike=how == "spike")
            train_step(trainer, data, judge=lambda loss, norm: verdict)
        assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
        train_step(trainer, data)
        assert any(not torch.equal(old, new) for old, new in zip(before, state(), strict=True)), (
            "an update that is not left out moves them"
        )


def test_counts_of_a_bf16_model_are_exact() -> None:
    """bf16 counts to 256 in steps of one; upstream keeps the experts' counts in it."""
    from megatron.core.distributed import finalize_model_grads

    from sparsecod_megatron.train.step import train_step

    with small_trainer(*EXPERTS, "precision.dtype=bf16") as trainer:
        counts: list[torch.Tensor] = []

        def look(*args: Any, **kwargs: Any) -> None:
            named = trainer.models[0].named_buffers()
            counts.extend(tensor.clone() for name, tensor in named if name.endswith("local_tokens_per_expert"))
            finalize_model_grads(*args, **kwargs)

        trainer.megatron.finalize_model_grads_func = look
        data = trainer_batches(trainer)
        train_step(trainer, data, global_batch_size=82)
    # 82 sequences of 16 tokens, two experts each.
    assert [float(tensor.double().sum()) for tensor in counts] == [82 * 16 * 2.0] * 3
    assert any(float(count) > 256 and int(count) % 2 for tensor in counts for count in tensor)
