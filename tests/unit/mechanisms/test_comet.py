"""The router of trees: its gate by recursion in fp64, planted trees, the entropy loss, and its refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.experts.comet import CometGroup
from sparsecod_megatron.mechanisms.experts.comet_sparsecod import leaf_log_probabilities, tree_logits
from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from tests.helpers.megatron import SMALL, megatron_model, run_forward

select_backend()
TREES = ("mechanisms.comet.gamma=2", "model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")
NO_LOSSES = ("model.moe_aux_loss_coeff=0", "model.moe_z_loss_coeff=0")


def naive_gate(decisions: Any, leaves: Any, gamma: float) -> list[Any]:
    """g of every expert for one token, by the definition: recursion over nodes, probabilities, no logarithm."""

    def step(t: Any) -> Any:
        if t <= -gamma / 2:
            return torch.zeros_like(t)
        if t >= gamma / 2:
            return torch.ones_like(t)
        return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5

    def reach(tree: int, node: int, probability: Any) -> list[Any]:
        if node >= len(decisions[tree]):
            return [probability]
        left = step(decisions[tree][node])
        return reach(tree, 2 * node + 1, probability * left) + reach(tree, 2 * node + 2, probability * (1 - left))

    certain = torch.ones_like(leaves[0][0])
    weights = [
        [p * a.exp() for p, a in zip(reach(tree, 0, certain), own, strict=True)] for tree, own in enumerate(leaves)
    ]
    total = sum(sum(own) for own in weights)
    return [sum(own[expert] for own in weights) / total for expert in range(len(leaves[0]))]


@pytest.mark.parametrize(("trees", "experts", "gamma"), [(1, 2, 1.0), (2, 8, 3.0), (3, 4, 0.5)])
def test_gate_and_gradient_are_those_of_the_definition(trees: int, experts: int, gamma: float) -> None:
    """With nodes on both sides of the undecided region, in fp64."""
    generator = torch.Generator().manual_seed(trees)
    shapes = (6, trees, experts - 1), (6, trees, experts)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs_in = [each.detach().clone().requires_grad_() for each in inputs]
    direction = torch.randn(6, experts, generator=generator, dtype=torch.float64)
    ours = tree_logits(leaf_log_probabilities(inputs[0], gamma), inputs[1]).softmax(dim=-1)
    theirs = torch.stack([torch.stack(naive_gate(*token, gamma)) for token in zip(*theirs_in, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for gate, leaves in ((ours, inputs), (theirs, theirs_in)):
        (gate * direction).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    for mine, other in zip(inputs, theirs_in, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-9)


def test_paths_are_probabilities_and_decided_trees_leave_one_expert_each() -> None:
    torch.manual_seed(0)
    soft = leaf_log_probabilities(torch.randn(50, 3, 15), 4.0).exp()
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(50, 3))
    hard = 5 * torch.randn(50, 3, 15).sign()
    decided = leaf_log_probabilities(hard, 4.0)
    assert bool(((decided.exp() == 1).sum(dim=-1) == 1).all()) and bool(((decided.exp() == 0).sum(dim=-1) == 15).all())
    gate = tree_logits(decided, torch.randn(50, 3, 16)).softmax(dim=-1)
    assert int((gate > 0).sum(dim=-1).max()) <= 3 and bool(gate.isfinite().all())


def test_two_experts_and_one_tree_are_a_logistic_gate() -> None:
    """S(t) e^a over S(t) e^a + (1 − S(t)) e^b."""
    t, a, b = 0.3, 0.7, -0.2
    left = -2 * t**3 / 8 + 3 * t / 4 + 0.5
    logits = tree_logits(leaf_log_probabilities(torch.tensor([[t]]), 2.0), torch.tensor([[a, b]]))
    expected = left * math.exp(a) / (left * math.exp(a) + (1 - left) * math.exp(b))
    assert float(logits.softmax(dim=-1)[0]) == pytest.approx(expected, rel=1e-6)


def test_planted_trees_send_tokens_to_their_experts() -> None:
    """The first tree reads two channels' signs; the second always ends at the last expert."""
    with megatron_model(*TREES, *NO_LOSSES) as model, torch.no_grad():
        moe: Any = model.decoder.layers[1].mlp  # type: ignore[union-attr, index]
        for parameter in moe.router.parameters():
            parameter.zero_()
        moe.router.nodes.weight[0, 0] = moe.router.nodes.weight[1, 1] = moe.router.nodes.weight[2, 1] = 1
        moe.router.nodes.bias[3:] = -1  # right at every node
        moe.router.leaves.bias[:4] = math.log(3)
        signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        x = torch.cat((2 * signs, torch.randn(4, 30)), dim=1).unsqueeze(1)
        weights, chosen = moe.router(x)
        expected = 0.75 * torch.eye(4)
        expected[:, 3] += 0.25
        torch.testing.assert_close(weights, expected)
        assert bool((chosen | (expected == 0)).all()) and chosen.sum(dim=1).tolist() == [2] * 4


def test_statistics_of_planted_trees() -> None:
    """Undecided: all mass is even and half of it dropped; decided: nothing is."""
    with megatron_model(*TREES, *NO_LOSSES) as model, torch.no_grad():
        for layer in model.decoder.layers:  # type: ignore[union-attr, union-attr]
            for name, parameter in layer.mlp.router.named_parameters():  # type: ignore[union-attr]
                parameter.fill_(1.0 if name == "nodes.bias" and layer.layer_number == 2 else 0.0)
        group = CometGroup([model])
        sums = LayerAccumulator(num_layers=3, names=group.names, device=torch.device("cpu"))
        with group.collecting(sums):
            run_forward(model, torch.randint(64, (2, 16)))
        even, decided, _ = sums.reduce()
        assert [even[name] for name in group.names] == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)
        assert [decided[name] for name in group.names] == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def test_entropy_loss_reaches_nodes_as_its_definition_has_it() -> None:
    """The difference that the coefficient makes, against autograd through probabilities; leaves get none of it."""
    grads, node_weights, x = [], None, torch.randn(6, 1, 32)
    for coefficient in (0.0, 0.5):
        torch.manual_seed(1)
        with megatron_model(*TREES, *NO_LOSSES, f"mechanisms.comet.entropy_coeff={coefficient}") as model:
            router: Any = model.decoder.layers[1].mlp.router  # type: ignore[union-attr, index]
            weights, _ = router(x)
            (weights * torch.arange(4.0)).sum().backward()
            grads.append([router.nodes.weight.grad.clone(), router.leaves.weight.grad.clone()])
            node_weights, node_bias = router.nodes.weight.detach().clone().requires_grad_(), router.nodes.bias.detach()
    assert node_weights is not None
    t = (x.view(6, 32) @ node_weights.t() + node_bias).view(6, 2, 3)
    left = torch.where(t.abs() < 1, -(t**3) / 4 + 3 * t / 4 + 0.5, (t > 0).float())
    root, first, second = left.unbind(dim=-1)
    leaves = torch.stack((root * first, root * (1 - first), (1 - root) * second, (1 - root) * (1 - second)), dim=-1)
    (-0.5 * torch.xlogy(leaves, leaves.clamp_min(1e-30)).sum(dim=(1, 2)).mean()).backward()
    torch.testing.assert_close(grads[1][0] - grads[0][0], node_weights.grad, rtol=1e-4, atol=1e-5)
    assert float(node_weights.grad.abs().max()) > 1e-3
    torch.testing.assert_close(grads[1][1], grads[0][1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.comet={}"], "model.num_moe_experts: null, but mechanisms.comet"),
        ([*TREES, "model.num_moe_experts=6"], "model.num_moe_experts: 6 is not a power of two, as the leaves"),
        ([*TREES, "model.moe_router_score_function=sigmoid"], "model.moe_router_score_function: sigmoid"),
        (
            [*TREES, "model.moe_router_num_groups=2", "model.moe_router_group_topk=1"],
            "model.moe_router_num_groups: 2, but the trees of mechanisms.comet do not know groups",
        ),
        ([*TREES, "mechanisms.moe_x={}", "model.activation=relu"], "mechanisms.moe_x: is a router, and so is"),
        (
            [*TREES, "mechanisms.moe_router_topk_schedule={}", "model.moe_router_pre_softmax=true"],
            "mechanisms.moe_router_topk_schedule: changes the experts per token",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
