"""Models without their dead neurons and heads compute what they did with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import ModelConfig, load_config
from sparsecod_megatron.hf.dead_groups import without_dead_groups
from tests.helpers.megatron import SMALL
from tests.helpers.reference_gpt import forward, random_tensors
from tests.helpers.training import small_trainer, trainer_batches
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

select_backend()

TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(3))
GLM = (
    *MOE_SHAPE,
    "model.moe_shared_expert_intermediate_size=32",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_enable_expert_bias=true",
)


def kill(tensors: dict[str, Tensor], name: str, dead: list[int], groups: int) -> None:
    """Zeros in the columns of an output matrix, and nonsense in the rows behind them, which nobody reads."""
    columns = tensors[name].unflatten(1, (groups, -1))
    columns[:, dead] = 0
    entry = name.replace("linear_fc2", "linear_fc1").replace("linear_proj", "linear_qkv")
    rows = tensors[entry].unflatten(0, (-1, groups, 1) if "fc1" in entry else (1, groups, -1))
    rows[:, dead] = 5.0


def shapes(tensors: dict[str, Tensor], part: str) -> Iterator[tuple[int, ...]]:
    return (tuple(tensor.shape) for name, tensor in tensors.items() if part in name)


@pytest.mark.parametrize("name", ["pre", "mqa", "wide-heads", "tied", "qkv-bias"])
def test_neurons_and_heads_of_a_dense_model(name: str) -> None:
    """As wide as the layer with the most that live; of others as many dead ones stay as that needs."""
    model = load_config(None, [*SMALL, "model.num_attention_heads=8", "model.num_query_groups=4", *DENSE[name]]).model
    tensors, groups = random_tensors(model), model.query_groups
    for layer, dead in enumerate(([0, 5, 47], [1, 2, 3, 4], list(range(40)))):
        kill(tensors, f"decoder.layers.{layer}.mlp.linear_fc2.weight", dead, 48)
    for layer, dead in enumerate(([0], [groups - 1, 1], [0, 1])):
        if groups > 1:
            kill(tensors, f"decoder.layers.{layer}.self_attention.linear_proj.weight", dead, groups)
    found = without_dead_groups(model, tensors, ["neuron", "head"])
    narrow = dict(found.tensors)
    heads = max(groups - 1, 1)
    assert (found.model.ffn_hidden_size, found.model.query_groups, found.model.head_dim) == (45, heads, model.head_dim)
    assert found.removed["ffn_hidden_size"] == (48, 45)
    assert found.zeros == 1 + 37 + (2 if groups > 1 else 0)
    assert set(shapes(narrow, "linear_fc2")) == {(32, 45)}
    expected, ours = forward(model, tensors, TOKENS)[0], forward(found.model, narrow, TOKENS)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert "\n" not in found.described() and "model.ffn_hidden_size 48 → 45" in found.described()


def test_biases_of_neurons_go_with_them_and_those_of_the_stream_stay() -> None:
    model = load_config(None, [*SMALL, *DENSE["biases"]]).model
    tensors = random_tensors(model)
    for layer in range(3):
        kill(tensors, f"decoder.layers.{layer}.mlp.linear_fc2.weight", [0, 5, 47], 48)
    found = without_dead_groups(model, tensors, ["neuron"])
    assert set(shapes(dict(found.tensors), "mlp.linear_fc1.bias")) == {(90,)}
    expected, ours = forward(model, tensors, TOKENS)[0], forward(found.model, dict(found.tensors), TOKENS)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_experts_stay_a_multiple_of_what_grouped_products_take() -> None:
    """Routed ones by all experts of all layers together, the shared one by itself."""
    shape = (*MOE_SHAPE, *MOE["pre-softmax"], "model.moe_shared_expert_intermediate_size=24")
    model = load_config(None, [*SMALL, *shape]).model
    tensors = random_tensors(model)
    for layer in range(3):
        for expert in range(8):
            at = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight"
            kill(tensors, at, list(range(10 + (layer + expert) % 3)), 16)
        kill(tensors, f"decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight", [layer], 24)
    found = without_dead_groups(model, tensors, ["neuron"])
    assert found.removed == {"moe_ffn_hidden_size": (16, 8), "moe_shared_expert_intermediate_size": (24, 23)}
    expected, ours = forward(model, tensors, TOKENS)[0], forward(found.model, dict(found.tensors), TOKENS)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def planted(model: ModelConfig) -> dict[str, Tensor]:
    """Half of each expert dead."""
    tensors = random_tensors(model)
    for name in list(tensors):
        if "local_experts" in name and "linear_fc2" in name:
            kill(tensors, name, list(range(8)), 16)
    return tensors


def test_a_stock_class_is_not_given_up_for_a_width() -> None:
    """Glm4MoeForCausalLM has shared experts of a multiple of a routed one's width, which 33 is not of 8."""
    model = load_config(None, [*SMALL, *GLM]).model
    tensors = planted(model)
    assert without_dead_groups(model, tensors, ["neuron"]).removed["moe_ffn_hidden_size"] == (16, 8)
    kill(tensors, "decoder.layers.0.mlp.shared_experts.linear_fc2.weight", [0], 32)
    for layer in (1, 2):
        kill(tensors, f"decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight", [1], 32)
    found = without_dead_groups(model, tensors, ["neuron"])
    assert found.model is model and found.tensors is tensors and not found.removed
    assert "Glm4MoeForCausalLM cannot have moe_ffn_hidden_size=8" in found.described()


@pytest.mark.parametrize(
    ("settings", "removed", "class_name"),
    [
        (["efficient_llm={start: 0, end: 0, scope: matrix}"], {"ffn_hidden_size": [48, 24]}, "LlamaForCausalLM"),
        (["random_groups={pattern: head}"], {"num_query_groups": [2, 1]}, "LlamaForCausalLM"),
        (
            ["random_groups={pattern: head}", "model.attention_output_gate=elementwise", "model.activation=gelu"],
            {"num_query_groups": [2, 1]},
            "SparsecodForCausalLM",
        ),
    ],
)
def test_an_export_is_smaller_and_verified(
    settings: list[str], removed: dict[str, list[int]], class_name: str, tmp_path: Path
) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.cli.import_ import run_config
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.train.step import train_step

    with small_trainer(f"mechanisms.{settings[0]}", *settings[1:], "model.init_method_std=0.2") as trainer:
        train_step(trainer, trainer_batches(trainer))
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
    told: list[str] = []
    assert export_checkpoint(saved, tmp_path / "small", remove_dead=True, tell=told.append) is not None
    assert export_checkpoint(saved, tmp_path / "whole") is not None
    assert json.loads((tmp_path / "small/config.json").read_text())["architectures"] == [class_name]
    assert json.loads((tmp_path / "small/sparsity.json").read_text())["removed"] == removed
    assert "removed" not in json.loads((tmp_path / "whole/sparsity.json").read_text())
    assert len(told) == 1 and told[0].startswith("dead groups removed: model.")
    small, whole = (load_file(tmp_path / of / "model.safetensors") for of in ("small", "whole"))
    assert sum(tensor.numel() for tensor in small.values()) < sum(tensor.numel() for tensor in whole.values())
    imported = run_config(open_source(tmp_path / "small"), None).model
    (field, (_, after)), *_ = removed.items()
    assert getattr(imported, field) == after


def test_a_wrong_column_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the whole model, which names the branch."""
    from sparsecod_megatron.checkpoint import exported
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.errors import ConversionError

    with small_trainer("mechanisms.random_groups={}", "model.init_method_std=0.2") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
    name = "decoder.layers.1.mlp.linear_fc1.weight"

    def rolled(*arguments: object) -> object:
        found = without_dead_groups(*arguments)  # type: ignore[arg-type]
        tensors = dict(found.tensors)
        tensors[name] = tensors[name].roll(1, 0)
        return type(found)(found.model, tensors, found.removed, found.zeros)

    monkeypatch.setattr(exported, "without_dead_groups", rolled)
    with pytest.raises(ConversionError, match=r"layer 1: model\.layers\.1\.mlp\.down_proj\.weight"):
        exported.export_checkpoint(saved, tmp_path / "hf", remove_dead=True)


def test_what_else_goes_by_widths_keeps_them(tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    with small_trainer("mechanisms.random_groups={}", "mechanisms.headwise_gate={}") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
    told: list[str] = []
    export_checkpoint(saved, tmp_path / "hf", verify=False, remove_dead=True, tell=told.append)
    assert told == ["mechanisms.headwise_gate goes by the model's widths: dead groups stay as zeros"]
    assert json.loads((tmp_path / "hf/config.json").read_text())["intermediate_size"] == 48
