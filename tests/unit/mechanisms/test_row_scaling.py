"""Learned scales of parts of rows, against a model whose matrices are multiplied number by number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.weights.row_scaling import RowScaling
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.reference_gpt import forward
from tests.helpers.training import small_trainer, trainer_batches

select_backend()

UNFUSED = "megatron.gradient_accumulation_fusion=false"
"""Keeps gradients in `.grad`."""
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
KINDS = (
    ParameterKind("mlp_input", (96, 24), r"mlp\.linear_fc1\.weight", dimension=0, stacked=2, split="tensor"),
    ParameterKind("mlp_output", (10, 24), r"mlp\.linear_fc2\.weight", dimension=1, split="tensor"),
)


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Element (r, c) times A[r, ⌊c n / C⌋]."""
    columns = [column * scale.shape[1] // weight.shape[1] for column in range(weight.shape[1])]
    return torch.stack([weight[:, c] * scale[:, group] for c, group in enumerate(columns)], dim=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_logits_and_gradients(groups: int) -> None:
    """Those of an independent model, by autograd: of the scales and of the weights under them."""
    overrides = (f"mechanisms.row_scaling.groups={groups}", "model.init_method_std=0.2", UNFUSED)
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    with megatron_model(*overrides) as model:
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        scales = {name: leaf for name, leaf in leaves.items() if name.endswith("row_scale")}
        assert len(scales) == 3 * 4 and all(scale.shape[1] == groups for scale in scales.values())
        weights = {name: leaf for name, leaf in leaves.items() if name not in scales}
        for name, scale in scales.items():
            matrix = name.replace("row_scale", "weight")
            weights[matrix] = scaled(weights[matrix], scale)
        ours, (theirs, _) = run_forward(model, TOKENS), forward(config.model, weights, TOKENS)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)
        for logits in (ours, theirs):
            logits.square().mean().backward()
        for key, parameter in model.named_parameters():
            expected = leaves[key].grad
            assert expected is not None and bool(expected.any()), key
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: k + text)


def test_scales_begin_at_one_and_change_no_bit() -> None:
    """Neither loss nor gradients of a run's first pass."""
    found = []
    for overrides in ((), ("mechanisms.row_scaling={}",)):
        with small_trainer(*overrides, UNFUSED) as trainer:
            model = trainer.models[0].module
            tokens = TOKENS[:, : trainer.config.data.seq_length]
            logits = run_forward(model, tokens)
            logits.square().mean().backward()
            grads = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
            found.append((logits, {name: grad for name, grad in grads.items() if not name.endswith("row_scale")}))
            scales = [parameter for name, parameter in model.named_parameters() if name.endswith("row_scale")]
            assert len(scales) == (12 if overrides else 0) and all(bool((scale == 1).all()) for scale in scales)
    (plain, expected), (ours, gradients) = found
    assert torch.equal(ours, plain) and all(bool(grad.any()) for grad in expected.values())
    assert gradients.keys() == expected.keys() and all(torch.equal(gradients[key], expected[key]) for key in expected)


def test_weight_gradients_are_not_fused_where_the_weight_is_computed() -> None:
    """The parameter `weight` is there, but not what is multiplied: its gradient comes by autograd."""
    from sparsecod_megatron.model.build import fuse_weight_gradients

    with megatron_model("mechanisms.row_scaling.kinds=[qkv]") as built:
        model: Any = built
        for module in model.modules():
            module.fuse_wgrad_accumulation = False  # as every linear layer of Transformer Engine has it
        fuse_weight_gradients(model)
        attention = model.decoder.layers[0].self_attention
        assert not attention.linear_qkv.fuse_wgrad_accumulation and attention.linear_proj.fuse_wgrad_accumulation


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_rank_scales_its_part_of_the_matrix(kind: ParameterKind, ranks: int) -> None:
    """Also where its columns are half a group, or a group and a half."""
    mechanism, generator = RowScaling(groups=2), torch.Generator().manual_seed(2)
    weight, scale = (torch.randn(shape, generator=generator) for shape in (kind.shape, (kind.shape[0], 2)))
    whole = mechanism.composed(kind, {"weight": weight, "row_scale": scale})
    assert torch.equal(whole, scaled(weight, scale))
    for rank in range(ranks):
        if kind.dimension == 0:
            rows = torch.arange(kind.shape[0]).chunk(2 * ranks)
            mine = torch.cat(rows[rank::ranks])
            part, held, expected = weight[mine], scale[mine], whole[mine]
        else:
            part, held, expected = (weight.chunk(ranks, 1)[rank], scale, whole.chunk(ranks, 1)[rank])
        used = mechanism.part_of_rank(kind, held, rank, ranks)
        assert torch.equal(mechanism.composed(kind, {"weight": part, "row_scale": used}), expected)


def test_it_finds_what_rows_were_shrunk_by() -> None:
    """A planted scale of each half row, by the scales alone."""
    generator = torch.Generator().manual_seed(4)
    kind, mechanism = KINDS[0], RowScaling(groups=2)
    weight = torch.randn(kind.shape, generator=generator)
    planted = torch.rand((kind.shape[0], 2), generator=generator) + 0.5
    found = torch.ones_like(planted, requires_grad=True)
    optimizer = torch.optim.Adam([found], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        made = mechanism.composed(kind, {"weight": weight, "row_scale": found})
        (made - scaled(weight, planted)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(found.detach(), planted, rtol=0, atol=1e-3)


def test_the_table_says_what_a_scale_is() -> None:
    """A gain as a norm's is: no decay by default, no products of its own; the matrix stays what it is."""
    config = load_config(None, [*SMALL, "mechanisms.row_scaling={}"], mechanisms=MECHANISMS)
    rows = {row.name: row for row in ParameterTable.of(config).layer(0)}
    assert rows["qkv_row_scale"].shape == (rows["qkv"].shape[0], 2)
    assert (rows["qkv_row_scale"].group, rows["qkv_row_scale"].dimension) == ("norms", 0)
    assert (rows["mlp_output_row_scale"].dimension, rows["mlp_output_row_scale"].split) == (None, "none")
    plain = {row.name: row for row in ParameterTable(config.model).layer(0)}
    assert all(rows[name] == row for name, row in plain.items())
    assert sum(row.multiplied for row in rows.values()) == sum(row.multiplied for row in plain.values())


def test_beside_cast_an_export_folds_the_scales_and_keeps_the_zeros(tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    settings = ("mechanisms.cast={decay: 1, interval: 1}", "mechanisms.row_scaling={}", "train.train_steps=2")
    with small_trainer(*settings, "optimizer.lr=1e-2") as trainer:
        data = trainer_batches(trainer)
        for _ in range(2):
            train_step(trainer, data)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=2, optimizer_steps=2))
        linear = trainer.models[0].module.decoder.layers[1].self_attention.linear_proj
        expected = scaled(linear.weight.detach(), linear.row_scale.detach())
        assert bool((linear.row_scale != 1).any())
    assert export_checkpoint(saved, tmp_path / "hf") is not None
    weight = load_file(tmp_path / "hf/model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    torch.testing.assert_close(weight.float(), expected, rtol=1e-6, atol=1e-7)
    assert bool(((weight.view(-1, 4) != 0).sum(-1) == 2).all())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.ste={}"], "row_scaling.kinds: qkv has mechanisms.ste too, whose masks are made for each pass"),
        (["mechanisms.maskllm={}", "optimizer.weight_decay=0"], "row_scaling.kinds: qkv has mechanisms.maskllm too"),
        (["mechanisms.row_scaling.groups=3"], "row_scaling.groups: 3 does not divide the columns of qkv [64, 32]"),
        (["optimizer.optimizer=muon"], "optimizer.optimizer: muon orthogonalises whole matrices"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, "mechanisms.row_scaling={}", *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
