"""Which parameters decay and how fast each learns, seen in what a step does to every parameter of a real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL
from tests.helpers.training import small_trainer, trainer_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares with fp32 arithmetic on the CPU")

DENSE = ("model.qk_norm=true", "model.norm_placement=peri", "model.qkv_bias=true")
MOE = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_shared_expert_intermediate_size=24",
    "model.moe_shared_expert_gate=true",
    "model.moe_first_k_dense_layers=1",
)
TIED = ("model.untie_embeddings_and_output_weights=false",)
MUON = ("optimizer.optimizer=muon",)
LR, DECAY = 0.1, 0.5
EXPECTED = {
    "norms": {
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "final_layernorm.weight",
        "embedding_norm.weight",
        "q_layernorm.weight",
        "k_layernorm.weight",
        "self_attn_bda.norm.weight",
        "mlp_bda.norm.weight",
    },
    "biases": {"linear_qkv.bias"},
    "embeddings": {"word_embeddings.weight"},
    "output": {"output_layer.weight"},
    "router": {"router.weight"},
    "hidden": {
        "linear_qkv.weight",
        "linear_proj.weight",
        "linear_fc1.weight",
        "linear_fc2.weight",
        "shared_experts.gate_weight",
    },
}
PARTS = {"norms", "biases", "embeddings", "output", "hidden"}, {"norms", "embeddings", "output", "router", "hidden"}


def expected_kind(name: str) -> str:
    """The kind by the last parts of the name, written down by hand."""
    kinds = [kind for kind, ends in EXPECTED.items() for end in ends if f".{name}".endswith(f".{end}")]
    assert len(kinds) == 1, name
    return kinds[0]


def step_of_ones(trainer: Any, gradient: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter before and after one step in which all gradients are `gradient`; no weight is zero."""
    for parameter in trainer.models[0].parameters():
        torch.nn.init.normal_(parameter)
    before = {name: parameter.detach().clone() for name, parameter in trainer.models[0].named_parameters()}
    for parameter in trainer.models[0].parameters():
        parameter.main_grad.fill_(gradient)
    trainer.scheduler.step(increment=1)
    trainer.optimizer.prepare_grads()
    trainer.optimizer.step_with_ready_grads()
    return {
        name: (before[name], parameter.detach().clone()) for name, parameter in trainer.models[0].named_parameters()
    }


@pytest.mark.parametrize(
    "excluded", [[], ["norms"], ["biases", "router"], ["embeddings"], ["output", "norms"]], ids=str
)
@pytest.mark.parametrize(
    "model", [DENSE, MOE, (*DENSE, *MUON), (*MOE, *MUON)], ids=["dense", "moe", "dense-muon", "moe-muon"]
)
def test_exactly_the_listed_kinds_keep_their_size(model: tuple[str, ...], excluded: list[str]) -> None:
    """With no gradient a weight is multiplied by 1 − lr · decay, or left as it is."""
    settings = (f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", "schedule.lr_decay_style=constant")
    with small_trainer(*model, *settings, f"optimizer.no_weight_decay={excluded}") as trainer:
        changes = step_of_ones(trainer, 0.0)
    assert {expected_kind(name) for name in changes} in PARTS
    for name, (before, after) in changes.items():
        factor = 1.0 if expected_kind(name) in excluded else 1 - LR * DECAY
        torch.testing.assert_close(after, factor * before, rtol=1e-6, atol=0, msg=lambda text, name=name: name + text)


def test_a_tied_output_layer_is_an_embedding() -> None:
    settings = (f"optimizer.lr={LR}", "schedule.lr_decay_style=constant")
    for kind, shrinks in (("output", True), ("embeddings", False)):
        with small_trainer(*TIED, *settings, f"optimizer.no_weight_decay=[{kind}]") as trainer:
            changes = step_of_ones(trainer, 0.0)
            before, after = changes["module.embedding.word_embeddings.weight"]
            assert (after.norm() < before.norm()) == shrinks
            assert not any("output_layer" in name for name in changes)


@pytest.mark.parametrize(
    ("name", "overrides", "group"),
    [
        ("module.module.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", (), "norms"),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight12", MOE, "hidden"),
        ("decoder.layers.3.self_attention.linear_gate.weight", ("mechanisms.headwise_gate={}",), "hidden"),
        ("output_layer.weight", (), "output"),
        ("output_layer.weight", TIED, "embeddings"),
    ],
)
def test_names_that_only_other_backends_and_stages_have(name: str, overrides: tuple[str, ...], group: str) -> None:
    table = ParameterTable.of(load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS))
    assert table.find(name).group == group
    with pytest.raises(LookupError, match="no row for decoder.layers.0.mlp.linear_fc3.weight"):
        table.find("decoder.layers.0.mlp.linear_fc3.weight")


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_mup_rates(model: tuple[str, ...]) -> None:
    """AdamW's first step moves every element by its rate; at the end of the schedule too."""
    settings = (
        "model.mup_base_hidden_size=8",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0",
        "schedule.min_lr_ratio=0.1",
        "train.train_steps=2",
    )
    with small_trainer(*model, *settings) as trainer:
        for rate in (0.1 + 0.9 / 2, 0.1):  # cosine: half way, and the end
            for name, (before, after) in step_of_ones(trainer, 1.0).items():
                width = 1.0 if expected_kind(name) in ("norms", "biases", "embeddings") else 1 / 4
                expected = torch.full_like(before, LR * rate * width)
                torch.testing.assert_close(before - after, expected, rtol=1e-3, atol=1e-6, msg=lambda t, n=name: n + t)


def test_without_a_base_width_all_rates_are_the_same() -> None:
    with small_trainer(*MOE) as trainer:
        trainer.scheduler.step(increment=1)
        assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


def test_mup_rates_survive_a_checkpoint(tmp_path: Path) -> None:
    """Megatron-Core takes groups for the same unless something besides their rates tells them apart."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    settings = (*MOE, "model.mup_base_hidden_size=8", "optimizer.no_weight_decay=[]")

    with small_trainer(*settings) as trainer:
        train_step(trainer, trainer_batches(trainer))
        rates = [(group["max_lr"], group["min_lr"]) for group in trainer.optimizer.param_groups]
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
    assert len(set(rates)) == 2
    with small_trainer(*settings, "train.seed=7") as trainer:
        load_checkpoint(saved, trainer)
        assert [(group["max_lr"], group["min_lr"]) for group in trainer.optimizer.param_groups] == rates


@pytest.mark.parametrize("field", ["decoupled_lr=1.0", "apply_wd_to_qk_layernorm=true"])
def test_fields_that_would_have_no_effect_are_refused(field: str) -> None:
    with (
        pytest.raises(ConfigError, match=re.escape(f"megatron.{field.partition('=')[0]}")),
        small_trainer(f"megatron.{field}"),
    ):
        pass


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("optimizer.muon_num_ns_steps=7",), "optimizer.muon_num_ns_steps: 7"),
        (("model.mup_base_hidden_size=16",), "model.mup_base_hidden_size: 16"),
    ],
)
def test_refused_with_muon(overrides: tuple[str, ...], part: str) -> None:
    load_config(None, [*SMALL, *overrides])
    with pytest.raises(ConfigError, match=part):
        load_config(None, [*SMALL, *MUON, *overrides])
