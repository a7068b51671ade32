"""Layers applied several times: gradients of separate copies, what is counted and exported, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.residual.loop import Loop
from sparsecod_megatron.planning.layout import layout_of
from tests.dist.layouts import BUCKETS, FULL_RECOMPUTE, PP2
from tests.helpers.megatron import SMALL
from tests.helpers.reference_gpt import forward
from tests.helpers.training import recorded_steps, small_trainer, trainer_batches

select_backend()
TOKENS, LABELS = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(3))
DEPTH = "model.num_layers=6"
LOOP = (DEPTH, "mechanisms.loop={first: 1, last: 2, times: 2}", "model.init_method_std=0.2")
OWNERS = [0, 1, 2, 1, 2, 5]


def unrolled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Separate copies of the weights of every layer, by the name of the layer that applies them."""
    weights = dict(model.named_parameters())
    found = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    for layer, owner in enumerate(OWNERS):
        for name, weight in weights.items():
            if name.startswith(f"decoder.layers.{owner}."):
                copy = weight.detach().clone().requires_grad_()
                found[name.replace(f"layers.{owner}.", f"layers.{layer}.")] = copy
    return found


def test_places_and_owners_by_hand() -> None:
    model = load_config(None, [*SMALL, *LOOP], mechanisms=MECHANISMS).model
    loop = Loop(first=1, last=2, times=2)
    assert [loop.owner(model, layer) for layer in range(6)] == OWNERS
    assert [loop.place(layer) for layer in range(6)] == [None, (0, 0), (0, 1), (1, 0), (1, 1), None]


@pytest.mark.parametrize(
    "overrides", [(), FULL_RECOMPUTE, (*FULL_RECOMPUTE, *BUCKETS)], ids=["plain", "recompute", "recompute-buckets"]
)
def test_gradients_are_sums_over_unrolled_copies(overrides: tuple[str, ...]) -> None:
    """Of an independent model whose iterations have weights of their own."""
    with small_trainer(*LOOP, *overrides) as trainer:
        wrapper: Any = trainer.models[0]
        model = wrapper.module
        wrapper.zero_grad_buffer()
        weights, config = unrolled(model), trainer.config.model
        losses = wrapper(TOKENS, torch.arange(16).expand_as(TOKENS), None, labels=LABELS)
        losses.sum().backward()
        found = {name: weight.main_grad.clone() for name, weight in model.named_parameters()}
    assert {name.split(".")[2] for name in found if "layers" in name} == {"0", "1", "2", "5"}
    logits, _ = forward(config, weights, TOKENS)
    expected = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none").view(2, 16)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    expected.sum().backward()
    for name, gradient in found.items():
        copies = [name] + [
            name.replace(f"layers.{owner}.", f"layers.{layer}.")
            for layer, owner in enumerate(OWNERS)
            if layer != owner and name.startswith(f"decoder.layers.{owner}.")
        ]
        assert len(copies) == (2 if re.match(r"decoder\.layers\.[12]\.", name) else 1)
        parts = [weights[copy].grad for copy in copies]
        assert all(part is not None and part.any() for part in parts)
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("experts", [(), ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")])
def test_counts_parameters_once_and_operations_each_time(experts: tuple[str, ...]) -> None:
    tables = {
        name: ParameterTable.of(load_config(None, [*SMALL, *experts, *overrides], mechanisms=MECHANISMS))
        for name, overrides in (("loop", LOOP), ("six", [DEPTH]), ("four", ["model.num_layers=4"]))
    }
    counts = {name: table.count() for name, table in tables.items()}
    assert counts["loop"].total == counts["four"].total and counts["loop"].active == counts["four"].active
    assert [size > 0 for size in counts["loop"].by_layer] == [True, True, True, False, False, True]
    assert flops_per_token(tables["loop"], 16) == flops_per_token(tables["six"], 16)


def test_plans_the_stage_that_holds_the_loop() -> None:
    """The middle of three stages has the work of all its layers, and the weights of half of them."""
    small = [*SMALL, DEPTH, "parallel.pipeline_model_parallel_size=3", "mechanisms.loop={first: 2, last: 2, times: 2}"]
    layout = layout_of(load_config(None, small, mechanisms=MECHANISMS), 3)
    held = [sum(count for kind, count in layout.stage_parameters(stage) if kind.name == "qkv") for stage in range(3)]
    assert held == [2, 1, 2]
    assert [layout.stage_layers(stage).total() for stage in range(3)] == [2, 2, 2]
    assert layout.distinct_stages == [0, 1, 2]


def test_statistics_are_of_each_iteration() -> None:
    """Layers in the loop say where they are; activations are an iteration's own, norms those of the shared weights."""
    intervals = [f"statistics.{name}.interval=1" for name in ("variance", "norms", "mechanisms")]
    with small_trainer(*LOOP, *intervals, "optimizer.clip_grad=0") as trainer:
        (layers,) = recorded_steps(trainer, trainer_batches(trainer), range(1, 2))["layers"]
        squares = [
            sum(float(weight.main_grad.double().square().sum()) for weight in layer.parameters())
            for layer in trainer.models[0].module.decoder.layers
        ]
    places = [(layer.get("loop_iteration"), layer.get("loop_block")) for layer in layers]
    assert places == [(None, None), (0, 0), (0, 1), (1, 0), (1, 1), (None, None)]
    assert len({layer["out_var"] for layer in layers}) == 6
    assert [layer["grad_norm"] for layer in layers] == pytest.approx([square**0.5 for square in squares])
    assert layers[1]["grad_norm"] == layers[3]["grad_norm"] != layers[2]["grad_norm"]


@pytest.mark.parametrize("beside", ["scaled.branch=0.5", "hyper_connections.streams=2"])
def test_exports_every_iteration(beside: str, tmp_path: Path) -> None:
    """As a plain model with copies of the weights, beside factors that fold and paths that need our own class."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    with small_trainer(*LOOP, f"mechanisms.{beside}") as trainer:
        recorded_steps(trainer, trainer_batches(trainer), range(1, 2))
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
    found = export_checkpoint(saved, tmp_path / "hf")
    assert found is not None
    found.require()
    tensors = load_file(tmp_path / "hf/model.safetensors")
    for layer, owner in enumerate(OWNERS):
        names = [name for name in tensors if name.startswith(f"model.layers.{layer}.")]
        assert names
        for name in names:
            owned = name.replace(f"layers.{layer}.", f"layers.{owner}.")
            assert torch.equal(tensors[name], tensors[owned])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["mechanisms.loop={first: 2, last: 1}"],
            "mechanisms.loop.last: 1 is before mechanisms.loop.first=2; raise it",
        ),
        (["mechanisms.loop={first: 1, last: 2, times: 3}"], "end with layer 6, but model.num_layers=6, which counts"),
        (["mechanisms.loop={first: 1, last: 2}", PP2], "stages of 3 layers divide layers 1 … 4 of mechanisms.loop"),
        (
            ["mechanisms.loop={first: 0, last: 0}", PP2, "megatron.num_layers_in_first_pipeline_stage=2"],
            "megatron.num_layers_in_first_pipeline_stage: 2, but mechanisms.loop has to lie in one stage",
        ),
        (
            ["mechanisms.loop={first: 0, last: 1}", "model.norm_placement=mix", "model.mix_post_fraction=0.4"],
            "mechanisms.loop: layer 2 has other parameters than layer 0, whose it should share",
        ),
        (
            ["mechanisms.loop={}", "mechanisms.attention_residuals.block_layers=1"],
            "mechanisms.loop: layer 1 has other parameters than layer 0",
        ),
        (["mechanisms.loop={}", "mechanisms.sparse_weights={}"], "mechanisms.sparse_weights is of layers that share"),
        (
            [
                "mechanisms.loop={}",
                "precision.dtype=bf16",
                "precision.fp8_recipe=tensorwise",
                "precision.fp8_param_gather=true",
            ],
            "precision.fp8_param_gather: true, but FP8 weights that layers of mechanisms.loop share",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, DEPTH, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
