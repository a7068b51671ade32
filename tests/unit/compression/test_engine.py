"""The layer-sequential engine against one written out for Llama, and on every layout of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, PreTrainedModel

from sparsecod_megatron.compression.allocate import shares
from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.experts import separate_experts
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.compression.watching import Watcher, slots_of
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf.blocks import find_layers
from sparsecod_megatron.parallel.processes import Processes
from tests.helpers.decoders import VOCAB_SIZE, tiny_decoder
from tests.unit.compression.models import sequences, tiny

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
FAMILIES = ("llama", "qwen3_moe", "gpt2", "gpt_neox", "deepseek_v3")


def pruned(
    model: PreTrainedModel, method: str, *settings: str, tokens: Tensor | None = None, batch: int = 4
) -> Compression:
    tokens = sequences(16) if tokens is None else tokens
    return compress(model, find_method(method, settings), tokens, batch_size=batch)


def matrix(block: torch.nn.Module, leaf: str) -> torch.nn.Module:
    return next(module for name, module in block.named_modules() if name.endswith(leaf))


@torch.no_grad()
def wanda_by_hand(model: LlamaForCausalLM, tokens: Tensor, *, inputs: str, order: str) -> None:
    """Half of every row by |W|·‖X‖, with whole passes of the whole model for the inputs of each matrix."""
    dense = {name: weight.clone() for name, weight in model.named_parameters()}
    done: dict[str, Tensor] = {}

    def norms(layer: int, leaf: str, weights: dict[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []
        module = matrix(model.model.layers[layer], leaf)
        hook = module.register_forward_hook(lambda _module, given, _output: seen.append(given[0].flatten(0, -2)))
        kept = {name: weight.clone() for name, weight in model.named_parameters()}
        for name, weight in model.named_parameters():
            weight.copy_(weights.get(name, dense[name]))
        model(tokens)
        hook.remove()
        for name, weight in model.named_parameters():
            weight.copy_(kept[name])
        return torch.cat(seen).double().norm(dim=0)

    for layer in range(len(model.model.layers)):
        before = dict(done)
        for group in GROUPS:
            known = {} if inputs == "dense" else dict(done) if order == "true" else before
            for leaf in group:
                name = next(name for name in dense if f"layers.{layer}." in name and name.endswith(f"{leaf}.weight"))
                weight = dense[name]
                score = weight.abs() * norms(layer, leaf, known)
                going = score.argsort(1)[:, : weight.shape[1] // 2]
                done[name] = weight.scatter(1, going, 0.0)
    for name, weight in done.items():
        model.get_parameter(name).copy_(weight)


@pytest.mark.parametrize(("inputs", "order"), [("sparse", "block"), ("sparse", "true"), ("dense", "block")])
def test_blocks_are_pruned_in_turn_as_by_hand(inputs: str, order: str) -> None:
    tokens, expected = sequences(6), tiny("llama", num_hidden_layers=3)
    wanda_by_hand(expected, tokens, inputs=inputs, order=order)
    result = pruned(tiny("llama", num_hidden_layers=3), "wanda", f"inputs={inputs}", f"order={order}", tokens=tokens)
    for name, weight in expected.named_parameters():
        assert torch.equal(result.model.get_parameter(name), weight), name


def test_the_three_ways_differ() -> None:
    """Otherwise the test above could not tell them apart."""
    ways = [("inputs=dense",), ("order=true",), ()]
    models = [pruned(tiny("llama", num_hidden_layers=3), "wanda", *way).model for way in ways]
    last = [model.get_parameter("model.layers.2.mlp.down_proj.weight") for model in models]
    assert not torch.equal(last[0], last[1]) and not torch.equal(last[1], last[2]) and not torch.equal(last[0], last[2])


@pytest.mark.parametrize("method", ["wanda+dsnot", "sparsegpt+cg"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_weights_is_pruned_to_the_pattern(family: str, method: str) -> None:
    tokens = torch.randint(VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
    result = pruned(tiny_decoder(family), method, "pattern=2:4", tokens=tokens)
    rows = [row for row in result.matrices if row.compressed]
    assert rows and all(row.zeros == pytest.approx(0.5) for row in rows)
    assert all(row.output_error is not None and 0 < row.output_error < 1 for row in rows)
    left = {row.kind.rpartition(".")[2] for row in result.matrices if not row.compressed}
    assert left <= {"gate"}, "routers alone stay"
    transposed = family == "gpt2"
    for row in rows:
        weight = result.model.get_parameter(row.name)
        weight = weight.T if transposed else weight
        assert bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()), row.name


def test_output_errors_are_those_of_the_inputs_seen() -> None:
    """By hand on the first block, whose inputs no pruning changes."""
    dense, tokens = tiny("llama"), sequences(6)
    seen: dict[str, list[Tensor]] = {}
    for leaf in ("q_proj", "gate_proj", "down_proj"):
        module = matrix(dense.model.layers[0], leaf)
        module.register_forward_hook(lambda _m, given, _o, leaf=leaf: seen.setdefault(leaf, []).append(given[0]))
    with torch.no_grad():
        dense(tokens)
    result = pruned(tiny("llama"), "wanda", tokens=tokens)
    for row in result.matrices:
        leaf = row.name.split(".")[-2]
        if ".0." in row.name and leaf in seen:
            inputs = torch.cat(seen[leaf]).flatten(0, -2)
            old, new = (model.get_parameter(row.name).detach() for model in (dense, result.model))
            expected = float((inputs @ (new - old).T).norm() / (inputs @ old.T).norm())
            assert row.output_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt+cg", "wanda+dsnot"])
def test_masks_do_not_depend_on_the_batch_size(method: str) -> None:
    one, sixteen = (pruned(tiny("llama"), method, batch=batch) for batch in (1, 16))
    same = total = 0
    for row in one.matrices:
        first, second = one.model.get_parameter(row.name) == 0, sixteen.model.get_parameter(row.name) == 0
        same, total = same + int((first == second).sum()), total + first.numel()
    assert same >= 0.9999 * total


def test_bf16_weights_are_pruned_in_float32_and_stored_as_they_were() -> None:
    result = pruned(tiny("llama").bfloat16(), "sparsegpt+cg", "pattern=2:4")
    for row in result.matrices:
        weight = result.model.get_parameter(row.name)
        assert weight.dtype == torch.bfloat16 and row.zeros == 0.5
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight, "still tied"


def test_experts_have_counts_of_their_own_and_share_where_those_are_few() -> None:
    """No token reaches the last expert of this Mixtral: it is pruned by the inputs of all, and the report says so."""
    tokens, dense = sequences(64), tiny("mixtral")
    result = pruned(tiny("mixtral"), "wanda", "pattern=2:4", tokens=tokens)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = dense.model.layers[0].mlp.experts
    given: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda _m, args: given.append((args[0], args[1])))
    with torch.no_grad():
        dense(tokens)
    hidden, chosen = (torch.cat(part) for part in zip(*given, strict=True))
    rows_of = [hidden[(chosen == expert).any(-1)] for expert in range(5)]
    assert len(rows_of[4]) == 0 and min(map(len, rows_of[:4])) > 8
    everything = torch.cat(rows_of)  # a token counts for each of its experts
    for expert, rows in enumerate(rows_of):
        weight = dense.get_parameter(name)[expert].detach()
        score = weight.abs() * (rows if len(rows) else everything).norm(dim=0)
        kept = torch.zeros_like(score, dtype=torch.bool).unflatten(-1, (-1, 4))
        kept.scatter_(-1, score.unflatten(-1, (-1, 4)).topk(2).indices, True)
        assert torch.equal(result.model.get_parameter(name)[expert] != 0, kept.flatten(-2)), expert
    said = [warning for warning in result.warnings if "matrices of experts had fewer inputs" in warning]
    assert len(said) == 1 and f"the first {name}[4]" in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_that_are_given_one_tensor_share_one_count(family: str) -> None:
    """Found from the calls alone: entries of attention together, gate and up together, others by themselves."""
    model = tiny_decoder(family)
    layers = find_layers(model)
    block, name = layers.blocks[-1], f"{layers.name}.{len(layers) - 1}"
    with separate_experts(block), torch.no_grad():
        slots = slots_of(block, name, {key for key, weight in eligible(model) if weight.ndim > 1})
        watcher = Watcher(slots, gram=False)
        with watcher.watching():
            model(torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0)))
        found = watcher.totals(Processes())
    given: dict[int, list[str]] = {}
    for key, statistics in found.items():
        given.setdefault(id(statistics), []).append(key.removeprefix(f"{name}.").removesuffix(".weight"))
    expected = {
        "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
        "gpt_neox": [],  # one matrix for queries, keys and values
        "gpt2": [],
        "qwen3_moe": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
        "deepseek_v3": [["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]],
    }[family]
    shared = [keys for keys in given.values() if len(keys) > 1 and not any("shared" in key for key in keys)]
    assert shared == expected
    assert all(statistics.count > 0 for statistics in found.values()) and len(given) >= 4


def test_groups_stay_or_go_whole() -> None:
    result = pruned(tiny("llama"), "wanda+cg", "pattern=group:8:0.5")
    for row in result.matrices:
        live = (result.model.get_parameter(row.name) != 0).unflatten(-1, (-1, 8)).sum(-1)
        assert row.zeros == pytest.approx(0.5) and set(live.unique().tolist()) == {0, 8}


def test_a_planted_idle_block_loses_more() -> None:
    """A block that writes nothing into the stream loses the most; the whole loses what was asked."""
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        for leaf in ("o_proj", "down_proj"):
            matrix(model.model.layers[2], leaf).weight.mul_(1e-3)
    result = pruned(model, "wanda", "allocation=influence", "per=matrix", "spread=0.5")
    zeros: dict[int, list[float]] = {}
    for row in result.matrices:
        zeros.setdefault(int(row.name.split(".")[2]), []).append(row.zeros * row.num_weights)
    weights = sum(row.num_weights for row in result.matrices) / 4
    found = [sum(zeros[layer]) / weights for layer in range(4)]
    assert max(found) == found[2] and 0.7 < found[2] < 0.7501 and max(abs(share - 0.5) for share in found) > 0.249
    assert sum(found) / 4 == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ConfigError, match="2:4 leaves no share to allocate"):
        find_method("wanda", ["allocation=influence", "pattern=2:4"])
    with pytest.raises(ConfigError, match="order=true has no meaning with inputs=dense"):
        find_method("wanda", ["order=true", "inputs=dense"])


def test_shares_keep_their_mean_over_weights() -> None:
    found = shares(0.6, [0.1, 0.5, 0.2], [100, 300, 50], 0.9)
    assert sum(share * size for share, size in zip(found, [100, 300, 50], strict=True)) / 450 == pytest.approx(0.6)
    assert found[1] < found[2] < found[0] and all(0 <= share <= 1 for share in found)
    assert shares(0.6, [0.3, 0.3], [1, 5], 0.9) == [0.6, 0.6]


def test_a_model_that_cannot_run_by_blocks_is_pruned_by_magnitude_and_says_so() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertLMHeadModel(BertConfig(vocab_size=67, is_decoder=False, **sizes)).eval()
    with pytest.raises(ConversionError, match="changes with later tokens"):
        pruned(model, "wanda")
    result = pruned(model, "magnitude")
    assert any(warning.startswith("output errors are not measured: ") for warning in result.warnings)
    assert all(row.output_error is None and row.zeros == 0.5 for row in result.matrices if row.compressed)
