"""Every attention and feed-forward weight of every family is found once, under its kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparsecod_megatron.analysis.sparsity.activation import Activation
from sparsecod_megatron.analysis.sparsity.experts import Experts
from sparsecod_megatron.analysis.sparsity.neurons import find_sites
from sparsecod_megatron.analysis.sparsity.weights import Weights
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import find_layers
from sparsecod_megatron.hf.matrices import find_matrices
from tests.helpers.decoders import tiny_config, tiny_decoder
from tests.unit.analysis.sparsity.tiny import CONFIGS, list_experts, sample, tiny_model

KINDS = {
    "gpt2": ["qkv", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
    "mixtral": ["q", "k", "v", "o", "gate_up", "down"],
    "olmoe": ["q", "k", "v", "o", "gate_up", "down"],
    "gpt_oss": ["q", "k", "v", "o", "gate_up", "down"],
    "qwen2_moe": ["q", "k", "v", "o", "gate_up", "down", "gate", "up", "down"],
}


@pytest.mark.parametrize("family", CONFIGS)
def test_kinds_of_each_family(family: str) -> None:
    context = sample(tiny_model(family))
    found = find_matrices(context.model, context.layers)
    expected = KINDS.get(family, ["q", "k", "v", "o", "gate", "up", "down"])
    for layer in range(2):
        assert sorted(matrix.kind for matrix in found if matrix.layer == layer) == sorted(expected)
    of_model = {name: id(parameter) for name, parameter in context.layers.blocks.named_parameters()}
    assert all(of_model[f"{matrix.layer}.{matrix.name}"] == id(matrix.weight) for matrix in found)
    left_out = set(of_model.values()) - {id(matrix.weight) for matrix in found}
    large = [name for name, key in of_model.items() if key in left_out and not _is_small(name)]
    assert large == []


def _is_small(name: str) -> bool:
    """Biases, norms, sinks and routers are no matrices of the definition."""
    return any(part in name for part in ("bias", "norm", "ln_", "sinks", "router", "mlp.gate.", "shared_expert_gate"))


def test_listed_experts_are_found_one_by_one() -> None:
    context = sample(list_experts(tiny_model("mixtral")))
    found = find_matrices(context.model, context.layers)
    assert [matrix.name for matrix in found if matrix.kind == "down" and matrix.layer == 1] == [
        f"mlp.experts.{index}.down_proj.weight" for index in range(4)
    ]


# Families whose blocks hold more than attention and feed-forward, or name their parts in their own way: the kind of
# each projection by its path, as the model's code uses it.
OTHERS = {
    "ctrl": "Wq q, Wk k, Wv v, dense o, ffn.0 up, ffn.2 down",
    "lfm2_moe": "conv.in_proj mixer, conv.out_proj mixer, w1 gate, w3 up, w2 down, gate_up_proj gate_up, "
    "down_proj down, q_proj q, k_proj k, v_proj v, out_proj o",
    "recurrent_gemma": "linear_y mixer, linear_x mixer, linear_out mixer, mlp_block.gate_proj gate, up_proj up, "
    "down_proj down, q_proj q, k_proj k, v_proj v, o_proj o",
    "mamba": "in_proj mixer, x_proj mixer, out_proj mixer",
    "bamba": "mamba.in_proj mixer, mamba.out_proj mixer, gate_proj gate, up_proj up, down_proj down, q_proj q, "
    "k_proj k, v_proj v, o_proj o",
    "nemotron_h": "in_proj mixer, out_proj mixer, q_proj q, k_proj k, v_proj v, o_proj o, up_proj up, down_proj down",
    "xlstm": "q mixer, k mixer, v mixer, ogate_preact mixer, igate_preact mixer, fgate_preact mixer, out_proj mixer, "
    "proj_up_gate gate, proj_up up, proj_down down",
    "rwkv": "attention.key k, attention.value v, attention.receptance qkv, attention.output o, feed_forward.key up, "
    "feed_forward.value down, feed_forward.receptance output_gate",
    "jetmoe": "mlp.input_linear gate_up, mlp.output_linear down, self_attention.experts.input_linear qkv, "
    "self_attention.experts.output_linear o, router.layer qkv, kv_proj kv",
    "afmoe": "q_proj q, k_proj k, v_proj v, o_proj o, self_attn.gate_proj output_gate, mlp.gate_proj gate, "
    "shared_experts.gate_proj gate, up_proj up, down_proj down, gate_up_proj gate_up",
    "moshi": "q_proj.linear q, k_proj.linear k, v_proj.linear v, o_proj.linear o, fc1 gate_up, fc2 down",
    "bart": "q_proj q, k_proj k, v_proj v, out_proj o, fc1 up, fc2 down",
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_kind_is_what_the_block_does_with_the_matrix(family: str) -> None:
    model = tiny_decoder(family)
    assert model is not None
    expected = dict(line.rsplit(" ", 1) for line in OTHERS[family].split(", "))
    found = find_matrices(model, find_layers(model))
    for matrix in found:
        path = f".{matrix.name.removesuffix('.weight')}"
        ends = [end for end in expected if path.endswith(f".{end}")]
        assert matrix.kind == expected[max(ends, key=len)], path
    assert {matrix.kind for matrix in found} == set(expected.values())


@pytest.mark.parametrize(("family", "networks"), [("recurrent_gemma", 3), ("lfm2", 3)])
def test_only_feed_forward_networks_are_sites(family: str, networks: int) -> None:
    types = {"recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]}}
    types["lfm2"] = {"layer_types": ["conv", "conv", "full_attention"]}
    config = tiny_config(family)
    config.update({"num_hidden_layers": 3} | types[family])
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).eval()
    sites = find_sites(find_matrices(model, find_layers(model)))
    assert [site.layer for site in sites] == list(range(networks))


def test_a_model_without_feed_forward_networks_has_no_neurons() -> None:
    with pytest.raises(ConversionError, match="no feed-forward network"):
        Activation().run(sample(tiny_decoder("mamba")))


def test_listed_experts_that_no_token_reached_have_the_kinds_of_their_fellows() -> None:
    model = list_experts(tiny_model("mixtral", num_local_experts=12))
    found = find_matrices(model, find_layers(model))
    assert sum(matrix.kind == "down" for matrix in found) == sum(matrix.kind == "gate" for matrix in found) == 24


def test_unknown_names_are_told_by_what_they_do() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = _Renamed(block.mlp)
        block.self_attn.q_proj = nn.Sequential(nn.Sequential(block.self_attn.q_proj))
        block.self_attn.o_proj = nn.Sequential(nn.Sequential(block.self_attn.o_proj))
    found = find_matrices(model, find_layers(model))
    assert {matrix.name.removesuffix(".weight"): matrix.kind for matrix in found if matrix.layer == 1} == {
        "self_attn.q_proj.0.0": "qkv",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj.0.0": "o",
        "mlp.inner.a": "up",
        "mlp.inner.b": "up",
        "mlp.c": "down",
    }


class _Renamed(nn.Module):
    """Llama's feed-forward network with names that no family has."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": mlp.gate_proj, "b": mlp.up_proj})
        self.c = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.silu(self.inner["a"](x)) * self.inner["b"](x))


@pytest.mark.parametrize("score", [Activation, Experts])
def test_experts_that_cannot_be_watched_are_not_called_dense(score: type[Activation | Experts]) -> None:
    with pytest.raises(ConversionError, match="JetMoeParallelExperts: its experts are not told"):
        score().run(sample(tiny_decoder("jetmoe")))


def test_weights_that_were_not_found_are_said() -> None:
    model = tiny_model("llama")
    whole = Weights().run(sample(model))
    assert whole.values["unmeasured_share"] == 0 and not whole.warnings
    left_out = sum(block.mlp.down_proj.weight.numel() for block in model.model.layers)
    for block in model.model.layers:  # a weight that is used without its module
        block.mlp.forward = _without_calling_down(block.mlp)
    found = Weights().run(sample(model))
    total = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim > 1)
    assert found.values["unmeasured_share"] == pytest.approx(3 * left_out / total)
    assert "of the blocks' weights are in no matrix" in found.warnings[0]


def _without_calling_down(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


def test_blocks_without_matrices_are_refused() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        block.mlp = nn.LayerNorm(32)
    with pytest.raises(ConversionError, match="no linear layer"):
        find_matrices(model, find_layers(model))
