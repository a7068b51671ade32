"""Fresh weights: every scheme's formula, muP, overrides, and the names that make them the same under every layout."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL

select_backend()

from sparsecod_megatron.model.matrices import _whole_name  # noqa: E402

D, F, L = 256, 512, 8
WIDE = (f"model.hidden_size={D}", f"model.ffn_hidden_size={F}", f"model.num_layers={L}", "model.vocab_size=512")
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=128", "model.moe_shared_expert_intermediate_size=64")


def fresh(*overrides: str) -> dict[str, torch.Tensor]:
    """Matrices of a model as it is built."""
    config = load_config(None, [*SMALL, *WIDE, *overrides], mechanisms=MECHANISMS)
    backend = select_backend()
    from sparsecod_megatron.model import build_model, transformer_config, unwrap
    from sparsecod_megatron.parallel import running_processes

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=False)
        model = unwrap(build_model(config, megatron, groups, device=backend.device, transformer_engine=False)[0])
        named = model.named_parameters()
        return {name: tensor.detach().clone() for name, tensor in named if tensor.dim() == 2}


def stds(layer: int, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """By kind, in one layer."""
    at = f"decoder.layers.{layer}"
    mlp = f"{at}.mlp.experts.local_experts.1" if f"{at}.mlp.router.weight" in weights else f"{at}.mlp"
    names = {
        "embedding": "embedding.word_embeddings.weight",
        "output": "output_layer.weight",
        "qkv": f"{at}.self_attention.linear_qkv.weight",
        "attention_output": f"{at}.self_attention.linear_proj.weight",
        "mlp_input": f"{mlp}.linear_fc1.weight",
        "mlp_output": f"{mlp}.linear_fc2.weight",
        "router": f"{at}.mlp.router.weight",
    }
    return {kind: float(weights[name].std()) for kind, name in names.items() if name in weights}


def test_every_matrix_is_drawn_once_and_no_two_alike() -> None:
    weights = fresh(*EXPERTS, "mechanisms.headwise_gate={}", "model.moe_shared_expert_gate=true")
    assert all(float(tensor.std()) > 0.01 for tensor in weights.values())
    starts = {tuple(tensor.flatten()[:4].tolist()) for tensor in weights.values()}
    assert len(starts) == len(weights)


def test_the_seed_decides() -> None:
    first, again, other = fresh("train.seed=1"), fresh("train.seed=1"), fresh("train.seed=2")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("layer", [0, 5])
def test_mitchell(layer: int) -> None:
    """1/sqrt(fan-in); outputs also over sqrt(2 (l + 1)); nothing beyond three standard deviations."""
    weights = fresh("model.init=mitchell", "model.untie_embeddings_and_output_weights=true")
    # A normal cut at 3 has 0.9866 of its standard deviation left.
    cut = float(stats.truncnorm(-3, 3).std())
    expected = {
        "embedding": D**-0.5,
        "output": D**-0.5,
        "qkv": D**-0.5,
        "mlp_input": D**-0.5,
        "attention_output": (2 * D * (layer + 1)) ** -0.5,
        "mlp_output": (2 * F * (layer + 1)) ** -0.5,
    }
    assert stds(layer, weights) == pytest.approx({kind: cut * std for kind, std in expected.items()}, rel=0.02)
    qkv = weights[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
    assert float(qkv.abs().max()) <= 3 * D**-0.5


def test_small_init() -> None:
    weights = fresh("model.init=small_init", *EXPERTS)
    small, wang = math.sqrt(2 / (5 * D)), 2 / (L * math.sqrt(D))
    expected = dict.fromkeys(("embedding", "output", "qkv", "mlp_input", "router"), small)
    assert stds(3, weights) == pytest.approx(expected | {"attention_output": wang, "mlp_output": wang}, rel=0.04)


def test_one_kind_can_have_its_own() -> None:
    weights = fresh("model.init_std.mlp_output=0.001", "model.init_std.embedding=1", "model.init=scaled")
    scaled = 0.02 / math.sqrt(2 * L)
    expected = {"embedding": 1, "output": 0.02, "qkv": 0.02, "mlp_input": 0.02, "mlp_output": 0.001}
    assert stds(2, weights) == pytest.approx(expected | {"attention_output": scaled}, rel=0.03)


def test_mup_keeps_the_embedding_and_narrows_the_rest() -> None:
    """Four times the base width: half the standard deviation, a quarter in output layer and routers."""
    weights = fresh("model.mup_base_hidden_size=64", *EXPERTS)
    hidden = dict.fromkeys(("qkv", "attention_output", "mlp_input", "mlp_output"), 0.01)
    expected = {"embedding": 0.02, "output": 0.005, "router": 0.005, **hidden}
    assert stds(2, weights) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight",
            "decoder.layers.5.mlp.experts.6.linear_fc1.weight",
        ),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight2", "decoder.layers.5.mlp.experts.6.linear_fc1.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.5.self_attention.linear_qkv.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
def test_names_do_not_depend_on_the_layout(name: str, whole: str) -> None:
    """Second layer of a stage that starts at layer 4, third expert of a rank that starts at expert 4."""
    assert _whole_name(name, layer=5, first_expert=4) == whole
