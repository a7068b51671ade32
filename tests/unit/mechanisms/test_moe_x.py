"""The router that counts units: moments and logits by loops, what it predicts, planted experts, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.experts.moe_x import experts_moments, sparsity_logits
from tests.helpers.megatron import SMALL, megatron_model

select_backend()
MOE_X = ("mechanisms.moe_x={}", "model.activation=relu", "model.num_moe_experts=5", "model.moe_ffn_hidden_size=24")
PLAIN = "megatron.gradient_accumulation_fusion=false"
NO_LOSSES = ("model.moe_aux_loss_coeff=0", "model.moe_z_loss_coeff=0")


def moe_of(model: Any) -> Any:
    return model.decoder.layers[1].mlp


def test_logits_are_those_of_a_loop() -> None:
    """Over experts, tokens and channels, in Python's floats."""
    with megatron_model(*MOE_X) as model:
        moe = moe_of(model)
        assert moe.router.weight is None and not any("router" in name for name, _ in model.named_parameters())
        x = torch.randn(3, 2, 32)
        ours = moe.router.gating(x)
        for expert in range(5):
            units = moe.experts.local_experts[expert].linear_fc1.weight.tolist()
            columns = list(zip(*units, strict=True))
            means = [sum(column) / len(column) for column in columns]
            variances = [sum((w - mu) ** 2 for w in c) / len(c) for c, mu in zip(columns, means, strict=True)]
            for token, got in zip(x.flatten(end_dim=1).tolist(), ours[..., expert].flatten().tolist(), strict=True):
                m = sum(a * mu for a, mu in zip(token, means, strict=True))
                s2 = sum(a * a * v for a, v in zip(token, variances, strict=True))
                assert got == pytest.approx(-math.erf(m / math.sqrt(2 * s2)), abs=1e-5)
        assert bool((moe.router.gating(torch.zeros(1, 1, 32)) == 0).all())


def test_the_prediction_is_the_share_of_units_that_are_on() -> None:
    """Units drawn around a mean of their own in each channel: the probability is met to a few percent."""
    torch.manual_seed(0)
    weights = torch.randn(4, 4000, 16) + 0.4 * torch.randn(4, 1, 16)
    x = torch.randn(200, 16)
    moments = torch.stack((weights.mean(dim=1), weights.var(dim=1, correction=0)), dim=1)
    predicted = (1 - sparsity_logits(x, moments)) / 2
    measured = (torch.einsum("th,efh->tef", x, weights) > 0).float().mean(dim=-1)
    assert float((predicted - measured).abs().max()) < 0.04 and float(measured.std()) > 0.1


def test_planted_experts_are_chosen() -> None:
    """The two whose units look away from a token are its two; with as many experts as there are, all weigh in."""
    with megatron_model(*MOE_X) as model, torch.no_grad():
        moe = moe_of(model)
        direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
        for index, expert in enumerate(moe.experts.local_experts):
            expert.linear_fc1.weight.add_(torch.tensor([0.1, -0.2, 0.0, -0.1, 0.2])[index] * direction)
        _, chosen = moe.router((5 * direction).view(1, 1, 32))
        assert chosen.tolist() == [[False, True, False, True, False]]
        _, chosen = moe.router((-5 * direction).view(1, 1, 32))
        assert chosen.tolist() == [[True, False, False, False, True]]


def test_all_experts_are_a_weighted_sum() -> None:
    """k = E: softmax of the logits over all of them; and gradients reach the token as through that formula."""
    with megatron_model(*MOE_X, "model.moe_router_topk=5", PLAIN, *NO_LOSSES) as model:
        moe = moe_of(model)
        x = torch.randn(6, 1, 32, requires_grad=True)
        theirs_in = x.detach().clone().requires_grad_()
        ours, _ = moe(x)
        (moments,) = experts_moments([moe.router])
        weights = sparsity_logits(theirs_in, moments).softmax(dim=-1)
        experts = [
            torch.relu(theirs_in @ each.linear_fc1.weight.detach().t()) @ each.linear_fc2.weight.detach().t()
            for each in moe.experts.local_experts
        ]
        theirs = sum(weights[..., index, None] * output for index, output in enumerate(experts))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for output in (ours, theirs):
            (output * torch.linspace(-1, 1, 32)).sum().backward()
        torch.testing.assert_close(x.grad, theirs_in.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.moe_x={}", "model.activation=relu"], "model.num_moe_experts: null, but mechanisms.moe_x"),
        ([*MOE_X, "model.activation=swiglu"], "model.activation: swiglu has no units that are off"),
        ([*MOE_X, "mechanisms.iss={}"], "stands before iss"),
        (
            ["mechanisms.monarch={blocks: 2, kinds: [mlp_input]}", *MOE_X],
            "mechanisms.monarch.kinds: mlp_input has no matrix that mechanisms.moe_x could read",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
