"""Product-key experts: output and gates by loops over all E² experts, planted keys, running statistics, refusals."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.experts.monet import MonetGroup
from sparsecod_megatron.mechanisms.experts.monet_sparsecod import key_gates, quantile
from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.training import small_trainer, trainer_batches

select_backend()
MONET = ("mechanisms.monet={experts: 6, heads: 3, k: 2}", "model.activation=relu2")
PLAIN = "megatron.gradient_accumulation_fusion=false"
EXPERTS, HIDDEN = 6, 32


def naive_gates(logits: Any, mean: Any, variance: Any, reach: float) -> Any:
    """By loops over both keys and all heads of one token's [E, 2, heads]."""
    gates = torch.zeros_like(logits)
    for key, head in itertools.product(range(2), range(logits.shape[-1])):
        own = logits[:, key, head]
        scaled = (own - mean[key, head]) / (variance[key, head] + 1e-5).sqrt()
        lowest = min(float(scaled.max()), reach)
        kept = [entry for entry in range(len(own)) if float(scaled[entry]) >= lowest]
        gates[kept, key, head] = own[kept].softmax(dim=0)
    return gates


def naive_expert(mlp: Any, x: Any, i: int, j: int, *, vertical: bool) -> Any:
    """Expert (i, j) alone on one token, from the rows and columns that are its own."""
    into, bias = mlp.linear_fc1.weight.view(EXPERTS, -1, HIDDEN), mlp.keys.unit_bias.view(EXPERTS, -1)
    out, offset = mlp.linear_fc2.weight.view(HIDDEN, EXPERTS, -1), mlp.keys.output_bias.view(EXPERTS, HIDDEN)
    if not vertical:
        return out[:, j] @ torch.relu(into[i] @ x + bias[i]).square() + offset[j]
    half = into.shape[1] // 2
    first = torch.relu(into[i, :half] @ x + bias[i, :half]).square()
    second = torch.relu(into[j, half:] @ x + bias[j, half:]).square()
    upper, lower = HIDDEN // 2, HIDDEN
    return torch.cat(
        (
            out[:upper, i, :half] @ first + out[:upper, i, half:] @ second + offset[i, :upper],
            out[upper:lower, j, :half] @ first + out[upper:lower, j, half:] @ second + offset[j, upper:],
        )
    )


@pytest.mark.parametrize("form", ["vertical", "horizontal"])
def test_output_and_gradients_are_those_of_a_loop_over_experts(form: str) -> None:
    with megatron_model(*MONET, f"mechanisms.monet.decomposition={form}", PLAIN) as model:
        mlp: Any = model.decoder.layers[1].mlp  # type: ignore[union-attr, index]
        mlp.keys.mean.copy_(torch.randn(6) / 10)
        x = torch.randn(4, 1, HIDDEN, requires_grad=True)
        theirs_in = x.detach().clone().requires_grad_()
        ours, bias = mlp(x)
        assert bias is None
        theirs = []
        for token in theirs_in.flatten(end_dim=1):
            logits = (mlp.keys.projection.weight @ token).view(EXPERTS, 2, 3)
            gates = naive_gates(logits, mlp.keys.mean.view(2, 3), mlp.keys.variance.view(2, 3), quantile(2, EXPERTS))
            theirs.append(
                sum(
                    (gates[i, 0] * gates[j, 1]).sum() * naive_expert(mlp, token, i, j, vertical=form == "vertical")
                    for i, j in itertools.product(range(EXPERTS), repeat=2)
                )
            )
        expected = torch.stack(theirs).unsqueeze(1)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        parameters = dict(mlp.named_parameters())
        grads = []
        for output, into in ((ours, x), (expected, theirs_in)):
            loss = (output * torch.linspace(-1, 1, HIDDEN)).sum()
            grads.append(torch.autograd.grad(loss, [into, *parameters.values()]))
        for name, mine, other in zip(("x", *parameters), *grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
            assert bool((other != 0).any()), name


def test_all_entries_and_even_gates_are_a_plain_mlp_over_the_experts() -> None:
    """k = E, one head, keys at zero: V act(U x + c) / E, and the mean of the biases."""
    settings = "mechanisms.monet={experts: 6, heads: 1, k: 6, decomposition: horizontal}"
    with megatron_model(settings, "model.activation=relu2") as model, torch.no_grad():
        mlp: Any = model.decoder.layers[0].mlp  # type: ignore[union-attr, index]
        mlp.keys.projection.weight.zero_()
        # Every expert's output weights alike, or the sum over them would not be a plain product.
        alike = mlp.linear_fc2.weight.view(HIDDEN, 6, -1)[:, :1].expand(-1, 6, -1).flatten(1)
        mlp.linear_fc2.weight.copy_(alike)
        x = torch.randn(5, 2, HIDDEN)
        units = torch.relu(x @ mlp.linear_fc1.weight.t() + mlp.keys.unit_bias).square()
        expected = units @ mlp.linear_fc2.weight.t() / 6 + mlp.keys.output_bias.view(6, HIDDEN).mean(dim=0)
        torch.testing.assert_close(mlp(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_planted_keys_choose_their_expert() -> None:
    """A token that points at entry 2 of one key and 5 of the other meets expert (2, 5) alone."""
    with megatron_model(*MONET) as model, torch.no_grad():
        mlp: Any = model.decoder.layers[0].mlp  # type: ignore[union-attr, index]
        directions = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q[:12].view(6, 2, HIDDEN)
        mlp.keys.projection.weight.copy_(directions.unsqueeze(2).expand(-1, -1, 3, -1).flatten(end_dim=2))
        token = 40 * (directions[2, 0] + directions[5, 1])
        gates = mlp.keys(token.view(1, 1, HIDDEN))[0, 0]
        expected = torch.zeros(6, 2, 3)
        expected[2, 0] = expected[5, 1] = 1
        torch.testing.assert_close(gates, expected)
        ours = mlp(token.view(1, 1, HIDDEN))[0].flatten()
        torch.testing.assert_close(ours, 3 * naive_expert(mlp, token, 2, 5, vertical=True), rtol=1e-4, atol=1e-4)


def test_as_many_entries_are_kept_as_asked_for() -> None:
    """Of normal logits with their own mean and deviation, k on average."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(400, 128, 2, 2) + 1
    gates = key_gates(logits, torch.ones(4), torch.full((4,), 9.0), quantile(16, 128))
    assert float((gates > 0).sum(dim=1).float().mean()) == pytest.approx(16, rel=0.02)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(400, 2, 2))


def test_running_statistics_are_those_of_the_steps_logits() -> None:
    """Over both micro-batches; a step that is left out and an evaluation change nothing."""
    from sparsecod_megatron.train.divergence import Verdict
    from sparsecod_megatron.train.step import evaluate, train_step

    with small_trainer(*MONET, "mechanisms.monet.momentum=0.25") as trainer:
        keys: Any = trainer.models[0].module.decoder.layers[1].mlp.keys
        assert float(keys.variance[0]) == pytest.approx(0.02**2 * HIDDEN)
        seen: list[torch.Tensor] = []
        handle = keys.projection.register_forward_hook(lambda module, args, out: seen.append(out[0].detach()))
        data = trainer_batches(trainer)
        train_step(trainer, data)
        handle.remove()
        logits = torch.cat([each.view(-1, EXPERTS, 2, 3) for each in seen]).double().flatten(end_dim=1)
        assert len(seen) == 2
        torch.testing.assert_close(keys.mean.double(), 0.25 * logits.mean(dim=0).flatten(), rtol=1e-4, atol=1e-7)
        expected = 0.75 * 0.02**2 * HIDDEN + 0.25 * logits.var(dim=0, correction=0).flatten()
        torch.testing.assert_close(keys.variance.double(), expected, rtol=1e-4, atol=1e-7)
        before = keys.mean.clone(), keys.variance.clone()
        train_step(trainer, data, judge=lambda loss, norm: Verdict(update=False))
        evaluate(trainer, data, num_steps=1)
        assert torch.equal(keys.mean, before[0]) and torch.equal(keys.variance, before[1]) and keys.sums is None


def test_statistics_of_planted_gates() -> None:
    """Keys at zero keep all six entries, each with a sixth."""
    with megatron_model(*MONET) as model, torch.no_grad():
        for layer in model.decoder.layers:  # type: ignore[union-attr, union-attr]
            layer.mlp.keys.projection.weight.zero_()  # type: ignore[union-attr]
        group = MonetGroup([model])
        sums = LayerAccumulator(num_layers=3, names=group.names, device=torch.device("cpu"))
        with group.collecting(sums):
            run_forward(model, torch.randint(64, (2, 16)))
        for means in sums.reduce():
            assert group.statistics(means) == pytest.approx({"monet_kept": 6.0, "monet_gate_squares": 1 / 6})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.monet.experts=6"], "model.activation: swiglu, but experts of mechanisms.monet have no gate"),
        ([*MONET, "model.num_moe_experts=4"], "model.num_moe_experts: 4, but mechanisms.monet is for dense MLPs"),
        ([*MONET, "mechanisms.monet.k=7"], "mechanisms.monet.k: 7 is more than experts=6"),
        ([*MONET, "mechanisms.monet.experts=16"], "model.ffn_hidden_size: 48 is not divisible by 32 = experts × 2"),
        (
            [*MONET, "mechanisms.monet.experts=3", "parallel.tensor_model_parallel_size=2"],
            "mechanisms.monet.experts: 3 is not divisible by parallel.tensor_model_parallel_size=2",
        ),
        ([*MONET, "optimizer.optimizer=muon"], "optimizer.optimizer: muon orthogonalises whole matrices"),
        ([*MONET, "mechanisms.topk_activation.k=4"], "mechanisms.topk_activation: changes the MLP's products"),
        (
            [*MONET, "mechanisms.monarch={blocks: 2, kinds: [mlp_input]}"],
            "mechanisms.monarch: changes the MLP's products",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
