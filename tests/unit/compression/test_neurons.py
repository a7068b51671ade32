"""Neurons that do nothing go first, those that stay compute what they did, and the configuration says how many stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from sparsecod_megatron.compression.compress import Compression, compress, write_model
from sparsecod_megatron.compression.merging import merge_neurons
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.models.opening import open_model
from tests.helpers.words import save_with_words
from tests.unit.compression.models import VOCAB_SIZE, sequences, tiny
from tests.unit.compression.test_contract import gpt2, logits


def narrowed(model: PreTrainedModel, *settings: str) -> Compression:
    return compress(model, find_method("neurons", settings), sequences(), batch_size=4)


def inputs_of(model: PreTrainedModel, layer: nn.Module) -> Tensor:
    """What enters a layer over the calibration tokens, [tokens, in]."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, args, _output: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(sequences())
    hook.remove()
    return torch.cat(seen)


def test_a_dead_neuron_goes_first_whatever_its_weights() -> None:
    model, dead = tiny("llama"), [7, 30]
    with torch.no_grad():
        for layer, neuron in zip(model.model.layers, dead, strict=True):
            layer.mlp.up_proj.weight[neuron] = 0
            layer.mlp.down_proj.weight[:, neuron] = 1e4
    before, old = logits(model), [layer.mlp.gate_proj.weight.clone() for layer in model.model.layers]
    result = narrowed(model, "share=0.02", "multiple=1")
    assert model.config.intermediate_size == 47 and result.num_parameters[0] - result.num_parameters[1] == 2 * 3 * 32
    assert torch.allclose(logits(model), before, atol=1e-5)
    for layer, weight, neuron in zip(model.model.layers, old, dead, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, torch.cat([weight[:neuron], weight[neuron + 1 :]]))
        assert (layer.mlp.up_proj.out_features, layer.mlp.down_proj.in_features) == (47, 47)


@pytest.mark.parametrize("merge", ["false", "true"])
def test_neurons_without_a_part_in_any_output_go_and_change_nothing(merge: str) -> None:
    """CETT 0: never on, whatever reads them, or always on and read by nothing."""
    model, silent, unread = tiny("llama"), [3, 9, 40], [0, 21, 47]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[silent] = 0
            layer.mlp.up_proj.weight[unread] *= 100
            layer.mlp.down_proj.weight[:, unread] = 0
    before, old = logits(model), [layer.mlp.gate_proj.weight.clone() for layer in model.model.layers]
    narrowed(model, "share=0.125", "multiple=1", f"merge={merge}")
    stay = [index for index in range(48) if index not in silent + unread]
    assert torch.allclose(logits(model), before, atol=1e-4)
    for layer, weight in zip(model.model.layers, old, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, weight[stay])


def test_every_expert_loses_its_own() -> None:
    """Fused experts; the last of them is reached by no token, so weights alone decide there."""
    model = tiny("mixtral")
    dead = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:8] for seed in range(5)])
    with torch.no_grad():
        for layer in model.model.layers:
            for expert, neurons in enumerate(dead[:4]):
                layer.mlp.experts.gate_up_proj[expert, 48 + neurons] = 0
            layer.mlp.experts.down_proj[4, :, dead[4]] *= 1e-3
    before, old = logits(model), model.model.layers[1].mlp.experts.gate_up_proj.clone()
    result = narrowed(model, "share=0.17")
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (5, 80, 32) and experts.down_proj.shape == (5, 32, 40)
    assert torch.allclose(logits(model), before, atol=1e-5)
    for expert, neurons in enumerate(dead.tolist()):
        stay = [index for index in range(96) if index % 48 not in neurons]
        assert torch.equal(experts.gate_up_proj[expert], old[expert, stay])
    assert "no calibration token reached 2 experts or layers" in result.warnings[-1]


@pytest.mark.parametrize(
    ("make", "layers_of", "exit_name", "is_transposed"),
    [
        (lambda: tiny("llama"), lambda model: [layer.mlp for layer in model.model.layers], "down_proj", False),
        (gpt2, lambda model: [block.mlp for block in model.transformer.h], "c_proj", True),
    ],
    ids=["llama", "gpt2"],
)
def test_the_smallest_parts_of_the_output_go(
    make: Callable[[], PreTrainedModel],
    layers_of: Callable[[PreTrainedModel], list[nn.Module]],
    exit_name: str,
    is_transposed: bool,
) -> None:
    """The norm of each neuron's outer product, in full; zeros in its place make the same model."""
    model, zeroed = make(), make()
    for small, whole in zip(layers_of(model), layers_of(zeroed), strict=True):
        leaving = getattr(whole, exit_name)
        weight = leaving.weight.detach().T if is_transposed else leaving.weight.detach()
        seen = inputs_of(model, getattr(small, exit_name))
        parts = torch.stack([torch.outer(seen[:, j], weight[:, j]).norm() for j in range(len(weight[0]))])
        weight[:, parts.argsort()[: len(parts) // 2]] = 0  # a view: this writes into the model
    narrowed(model, "share=0.5")
    assert [getattr(layer, exit_name).weight.numel() * 2 for layer in layers_of(model)] == [
        getattr(layer, exit_name).weight.numel() for layer in layers_of(zeroed)
    ]
    # Inputs are the dense model's, so no layer's choice depends on another's.
    assert torch.allclose(logits(model), logits(zeroed), atol=1e-5)


def with_twins(family: str) -> PreTrainedModel:
    """The second half of the neurons do what the first half do, up to size, and both have a part in the output."""
    model, generator = tiny(family), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts if family == "mixtral" else None
            for number in range(5 if experts else 1):
                if experts:
                    gate, up = experts.gate_up_proj[number].chunk(2)
                    down = experts.down_proj[number]
                else:
                    gate, up, down = (getattr(layer.mlp, f"{kind}_proj").weight for kind in ("gate", "up", "down"))
                sizes = 0.5 + torch.rand(24, 1, generator=generator)
                gate[24:], up[24:] = gate[:24], sizes * up[:24]
                down[:, 24:] = down[:, :24].flip(1) * (0.5 + torch.rand(24, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_twin_neurons_merge_without_a_trace(family: str) -> None:
    """One of each pair stays and takes over the other's part; by the norms of their parts alone the output changes."""
    before, tokens = logits(with_twins(family)), sequences()
    model, cut = with_twins(family), with_twins(family)
    result = narrowed(model, "share=0.5", "merge=true", "damping=1e-5")
    assert (logits(model) - before).abs().max() < 2e-3  # what the damping leaves
    narrowed(cut, "share=0.5")
    assert (logits(cut) - before).abs().max() > 0.5
    down = "experts.down_proj" if family == "mixtral" else "down_proj.weight"
    errors = {row.name: row.output_error for row in result.matrices}
    assert errors[f"model.layers.0.mlp.{down}"] == pytest.approx(0, abs=5e-4)
    if family == "llama":
        old, new = with_twins(family).model.layers[0].mlp, model.model.layers[0].mlp
        rows = [int((old.gate_proj.weight == row).all(1).nonzero()[0]) for row in new.gate_proj.weight]
        assert sorted(rows) == list(range(24)) and tokens.numel() > 48


@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_merging_is_greedy_least_squares(damping: float) -> None:
    """Every step against all candidates, each solved as a least-squares problem of its own; the rest is given."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(40, 7, dtype=torch.float64, generator=generator)
    inputs[:, 5] = inputs[:, 1] + 0.1 * inputs[:, 2]  # almost what two others do
    inputs[:, 3] = 0
    weight = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    weight[:, 3] *= 1e3  # a dead neuron goes first, whatever is behind it
    pull = damping * inputs.square().sum(0).mean()

    def solved(kept: list[int]) -> tuple[float, Tensor]:
        rows = torch.cat([inputs[:, kept], pull.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
        wanted = torch.cat([inputs @ weight.T, pull.sqrt() * weight[:, kept].T])
        found = torch.linalg.lstsq(rows, wanted).solution
        return float((rows @ found - wanted).square().sum()), found.T

    kept = list(range(7))
    for width in (6, 5, 4, 3):
        lost = {neuron: solved([other for other in kept if other != neuron])[0] for neuron in kept}
        kept.remove(min(lost, key=lambda neuron: lost[neuron]))
        stay, columns = merge_neurons(weight, inputs.T @ inputs, width, damping)
        assert stay.tolist() == kept and 3 not in kept
        assert torch.allclose(columns, solved(kept)[1], atol=1e-6)


def test_merging_lessens_the_error_that_it_reports() -> None:
    """For a layer as it is: the error in full, below that of cutting; share 0 is exact, and dead neurons go first."""
    dense, model, cut = tiny("llama"), tiny("llama"), tiny("llama")
    result = narrowed(model, "share=0.25", "merge=true")
    narrowed(cut, "share=0.25")
    exits = [each.model.layers[0].mlp for each in (dense, model, cut)]
    seen = inputs_of(dense, exits[0].down_proj)
    wanted = seen @ exits[0].down_proj.weight.T
    errors = []
    for mlp in exits[1:]:
        kept = [int((exits[0].gate_proj.weight == row).all(1).nonzero()) for row in mlp.gate_proj.weight]
        errors.append(float((seen[:, kept] @ mlp.down_proj.weight.T - wanted).detach().norm() / wanted.detach().norm()))
    reported = {row.name: row.output_error for row in result.matrices}["model.layers.0.mlp.down_proj.weight"]
    assert errors[0] == pytest.approx(reported, rel=1e-3) and errors[0] < 0.9 * errors[1]
    same, dead = tiny("llama"), tiny("llama")
    narrowed(same, "share=0", "merge=true")
    assert torch.equal(logits(same), logits(dense))
    with torch.no_grad():
        for layer in dead.model.layers:
            layer.mlp.up_proj.weight[5::6] = 0
    before = logits(dead)
    narrowed(dead, "share=0.167", "merge=true", "multiple=1")
    assert dead.config.intermediate_size == 40 and torch.allclose(logits(dead), before, atol=1e-4)


def test_merging_holds_few_products_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers in passes of their own give what they give together, for inputs are the dense model's in each."""
    together, apart = tiny("llama"), tiny("llama")
    narrowed(together, "share=0.5", "merge=true")
    monkeypatch.setattr("sparsecod_megatron.compression.methods.neurons.MOST_GRAM_BYTES", 4 * 48**2)
    narrowed(apart, "share=0.5", "merge=true")
    assert torch.equal(logits(apart), logits(together))


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "sparsecod"])
def test_share_0_changes_nothing(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    result = narrowed(model, "share=0")
    assert torch.equal(logits(model), before) and result.num_parameters[0] == result.num_parameters[1]


def test_each_field_sets_its_layers() -> None:
    model = tiny("qwen2_moe")
    model.config.intermediate_size = 40  # of dense layers, which this model has not
    narrowed(model, "share=0.5")
    config = model.config
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (8, 8)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 8)
    assert model.model.layers[0].mlp.shared_expert.up_proj.weight.shape == (8, 32)


def interleaved() -> PreTrainedModel:
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts._apply_gate = lambda both: torch.relu(both[..., ::2]) * both[..., 1::2]
    return model


def factored() -> PreTrainedModel:
    return compress(tiny("llama"), find_method("low_rank", ["rank=4"]), sequences(), batch_size=4).model


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (interleaved, ["share=0.5"], "MixtralExperts does not keep gate and up as two halves of one axis"),
        (lambda: tiny("mixtral"), ["share=0.02", "multiple=1"], "fused experts of 47 neurons cannot run"),
        (bloom, [], "BloomForCausalLM has no feed-forward layer whose width a field of its configuration sets"),
        (factored, [], "LlamaForCausalLM has no feed-forward layer whose width"),
        (
            lambda: with_twins("llama"),
            ["merge=true", "damping=1e-12"],
            "damping=1e-12: too little for sums of products",
        ),
        (lambda: tiny("llama"), ["share=0.02"], "share=0.02 with multiple=8 removes none of 48 neurons"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(
    make: Callable[[], PreTrainedModel], settings: list[str], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        narrowed(make(), *settings)


def test_a_class_of_ours_is_refused(tmp_path: Path) -> None:
    """Its configuration describes the model before the exchange."""
    source = save_with_words(tiny("llama"), tmp_path / "source")
    (tmp_path / "factored").mkdir()
    with open_model(source) as opened:
        method = find_method("low_rank", ["rank=4", "layers=*.self_attn.*"])
        result = compress(opened.model, method, sequences(), batch_size=4)
        write_model(result, opened.tokenizer, source, tmp_path / "factored")
    refusal = "CompressedLlamaForCausalLM has modules of --method low_rank"
    with open_model(tmp_path / "factored") as opened, pytest.raises(ConversionError, match=refusal):
        narrowed(opened.model)
