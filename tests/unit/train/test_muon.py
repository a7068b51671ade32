"""Muon through Megatron-Core on real small models: who steps what, resuming, statistics, falling losses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.newton_schulz import orthogonalized
from tests.helpers.training import collected_steps, small_trainer, trainer_batches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fp32 references run on the CPU")

MUON = ("optimizer.optimizer=muon", "optimizer.lr=1e-2")
MODELS = {
    "dense": (),
    "tied": ("model.untie_embeddings_and_output_weights=false",),
    "moe": (
        "model.num_moe_experts=4",
        "model.moe_ffn_hidden_size=24",
        "model.moe_shared_expert_intermediate_size=24",
        "model.moe_first_k_dense_layers=1",
    ),
}
VECTOR_OR_END = re.compile(r"norm|word_embeddings|output_layer")


@pytest.mark.parametrize("model", MODELS)
def test_matrices_are_muons_and_the_rest_adams(model: str) -> None:
    with small_trainer(*MODELS[model], *MUON) as trainer:
        from megatron.core.optimizer import muon

        first, *others = trainer.optimizer.chained_optimizers
        assert isinstance(first.optimizer, muon.TensorParallelMuon)
        assert [type(part.optimizer).__name__ for part in others] == ["FusedAdam"]
        names = {parameter: name for name, parameter in trainer.models[0].named_parameters()}
        stepped = [{names[parameter] for parameter in part.get_parameters()} for part in (first, *others)]
        assert stepped[1] == {name for name in names.values() if VECTOR_OR_END.search(name)}
        assert stepped[0] | stepped[1] == set(names.values()) and not stepped[0] & stepped[1]
        assert all(parameter.requires_grad for parameter in names)
        assert not trainer.models[0].ddp_config.use_distributed_optimizer


@pytest.mark.parametrize("gate", ["", "mechanisms.headwise_gate={}", "model.attention_output_gate=elementwise"])
def test_each_projection_of_attention_is_a_matrix_of_its_own(gate: str) -> None:
    """The first update of the fused projection is that of its parts: the momentum is then parallel to the gradient."""
    settings = (*MUON, *filter(None, [gate]), "optimizer.weight_decay=0", "optimizer.clip_grad=0")
    with small_trainer(*settings, "schedule.lr_decay_style=constant", "optimizer.muon_extra_scale_factor=1") as trainer:
        from sparsecod_megatron.train.step import train_step

        weight = trainer.models[0].get_submodule("module.decoder.layers.0.self_attention.linear_qkv").weight
        before = weight.detach().clone()
        train_step(trainer, trainer_batches(trainer))
        update, gradient = (before - weight.detach()) / 1e-2, weight.main_grad
    # Two groups: queries of two heads with eight channels (and as many gates), then one head of keys and of values.
    sizes = [16, 16, 8, 8] if "elementwise" in gate else [16, 8, 8]
    ours, theirs = (tensor.view(2, sum(sizes), 32).split(sizes, dim=1) for tensor in (update, gradient))
    for part, of_gradient in zip(ours, theirs, strict=True):
        matrix = of_gradient.reshape(-1, 32)
        expected = orthogonalized(matrix) * max(matrix.shape) ** 0.5
        torch.testing.assert_close(part.reshape(-1, 32).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("model", "dtype"), [("dense", "fp32"), ("tied", "bf16"), ("moe", "fp32"), ("moe", "bf16")])
def test_resumes_bitwise(model: str, dtype: str, tmp_path: Path) -> None:
    """Weights and losses after a resume are equal as numbers, whatever the weights that the new process drew."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    settings = (*MODELS[model], *MUON, f"precision.dtype={dtype}")

    def losses(trainer: Any, data: list[Iterator[Any]], steps: int) -> list[float]:
        return [train_step(trainer, data).loss for _ in range(steps)]

    def weights(trainer: Any) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in trainer.models[0].parameters()]

    with small_trainer(*settings) as trainer:
        data = trainer_batches(trainer)
        losses(trainer, data, 2)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=2, optimizer_steps=2))
        expected, final = losses(trainer, data, 3), weights(trainer)
    with small_trainer(*settings, "train.seed=7") as trainer:
        load_checkpoint(saved, trainer)
        data = trainer_batches(trainer)
        skipped = 2 * trainer.num_microbatches(4)
        for _ in range(skipped):
            next(data[0])
        assert losses(trainer, data, 3) == expected
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(trainer), final, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norms_are_those_of_the_weights(dtype: str) -> None:
    """grad_norm, param_norm and update_ratio of each layer against the tensors before and after the step."""
    with small_trainer(*MODELS["moe"], *MUON, "optimizer.clip_grad=0", f"precision.dtype={dtype}") as trainer:
        from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
        from sparsecod_megatron.model import unwrap

        model = unwrap(trainer.models[0])
        group = ParameterNormsGroup([model], trainer.optimizer)
        layers = [list(layer.parameters()) for layer in model.decoder.layers]
        before = [torch.cat([master(p).flatten().double() for p in layer]) for layer in layers]
        [statistics] = collected_steps(trainer, [group], steps=1)
        after = [torch.cat([master(p).flatten().double() for p in layer]) for layer in layers]
        for row, layer, old, new in zip(statistics, layers, before, after, strict=True):
            gradient = torch.cat([p.main_grad.flatten().double() for p in layer])
            assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert row["param_norm"] == pytest.approx(old.norm().item(), rel=1e-6)
            assert row["update_ratio"] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-5)


def master(parameter: Any) -> torch.Tensor:
    """The fp32 weights that the optimizer steps."""
    return getattr(parameter, "main_param", parameter).detach().clone()


@pytest.mark.parametrize("scale", ["spectral", "unit_rms_norm", "shape_scaling"])
def test_update_size_follows_the_scale_mode(scale: str) -> None:
    """RMS of an update over lr: factor · sqrt(min(out, in) / (out · in)), the singular values being near 1."""
    settings = (*MUON, f"optimizer.muon_scale_mode={scale}", "optimizer.weight_decay=0", "schedule.min_lr_ratio=1")
    with small_trainer(*settings, "optimizer.muon_extra_scale_factor=0.5") as trainer:
        from sparsecod_megatron.train.step import train_step

        weight = trainer.models[0].get_submodule("module.decoder.layers.0.mlp.linear_fc1").weight
        before = weight.detach().clone()
        train_step(trainer, trainer_batches(trainer))
        rms = ((before - weight.detach()) / 1e-2).square().mean().sqrt().item()
    rows, columns = 96, 32
    factor = {"spectral": rows**0.5, "unit_rms_norm": 3**0.5, "shape_scaling": 3**0.5}[scale]
    assert rms == pytest.approx(0.5 * factor * (columns / (rows * columns)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_loss_falls(model: str) -> None:
    """Tokens are drawn with a frequency to learn; from the uniform guess, log 64, most of what it is worth."""
    with small_trainer(*MODELS[model], *MUON, "train.train_steps=40") as trainer:
        from sparsecod_megatron.train.step import train_step

        data = trainer_batches(trainer)
        losses = [train_step(trainer, data).loss for _ in range(40)]
    assert losses[0] > 4.1 and sum(losses[-5:]) / 5 < losses[0] - 0.15
