"""Checkpoints whose optimizer is not that of their weights are neither written nor continued from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparsecod_megatron.errors import CheckpointError
from tests.dist.layouts import BUCKETS
from tests.helpers.training import small_trainer, trainer_batches

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer

PADDED = ("model.num_layers=2", "model.hidden_size=72", "model.ffn_hidden_size=120", *BUCKETS)
"""Buckets that end in padding."""
MOE = ("model.num_layers=2", "model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")
MUON = ("model.num_layers=2", "optimizer.optimizer=muon")


def stepped(trainer: Trainer) -> Trainer:
    """After one step, so that no moment is zero."""
    from sparsecod_megatron.train.step import train_step

    train_step(trainer, trainer_batches(trainer))
    return trainer


def save(trainer: Trainer, folder: Path) -> Path:
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    return save_checkpoint(folder, trainer, state=TrainState(step=1, optimizer_steps=1))


@contextlib.contextmanager
def upstreams_places(part: Any) -> Iterator[None]:
    """Megatron-Core 0.16.1's places of parameters, which count the padding of buckets."""
    yield


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As checkpoints were saved before `bucket_padding.py`."""
    from sparsecod_megatron.checkpoint import optimizer_state

    monkeypatch.setattr(optimizer_state, "places_without_padding", upstreams_places)


def as_of_before(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json, and the manifest with it."""
    from sparsecod_megatron.checkpoint.manifest import write_manifest

    path = directory / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    write_manifest(directory, {})


def without_digests(state: dict[str, Any]) -> None:
    state["format"] = 2
    del state["digests"]


@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_cut_out_wrongly_is_not_written(dtype: str, tmp_path: Path) -> None:
    message = r"step_00000001: not saved \(the optimizer's fp32 weights of .*layer.* are not the model's\)"
    with small_trainer(*PADDED, f"precision.dtype={dtype}") as trainer, pytest.raises(CheckpointError, match=message):
        save(stepped(trainer), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_earlier_versions_mixture_is_refused_and_not_what_is_right(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones of the same version go on, under the other precision too."""
    from sparsecod_megatron.checkpoint import saver
    from sparsecod_megatron.checkpoint.native import load_checkpoint

    with small_trainer(*PADDED, f"precision.dtype={dtype}") as trainer:
        right = save(stepped(trainer), tmp_path / "right")
        with monkeypatch.context() as before:
            before.setattr(saver, "verified_digests", lambda optimizer, sharded: {})
            before.setattr("sparsecod_megatron.checkpoint.optimizer_state.places_without_padding", upstreams_places)
            wrong = save(trainer, tmp_path / "wrong")
        for directory in (right, wrong):
            as_of_before(directory, without_digests)
        assert load_checkpoint(right, trainer).step == 1
        with pytest.raises(CheckpointError, match="fp32 weights of .* are not the model's; `sparsecod doctor"):
            load_checkpoint(wrong, trainer)
    other = {"fp32": "bf16", "bf16": "fp32"}[dtype]
    with small_trainer(*PADDED, f"precision.dtype={other}") as trainer:
        assert load_checkpoint(right, trainer).step == 1
        with pytest.raises(CheckpointError, match="fp32 weights of"):
            load_checkpoint(wrong, trainer)


@pytest.mark.parametrize("settings", [PADDED, MOE, (*MUON, "precision.dtype=bf16")], ids=["dense", "moe", "muon"])
def test_moments_of_another_parameter_are_refused(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Where each parameter's digests are, and that a digest which is not that of the tensor is noticed at load."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint

    with small_trainer(*settings) as trainer:
        directory = save(stepped(trainer), tmp_path)
        digests = json.loads((directory / "state.json").read_text())["digests"]
        assert "embedding.word_embeddings.weight" in digests
        assert {f"decoder.layers.{layer}.self_attention.linear_proj.weight" for layer in range(2)} <= digests.keys()
        assert load_checkpoint(directory, trainer).step == 1
        name = "decoder.layers.1.self_attention.linear_qkv.weight"
        kind = "momentum_buffer" if "optimizer.optimizer=muon" in settings else "exp_avg"

        def exchange(state: dict[str, Any]) -> None:
            one, other = (state["digests"][name.replace("1", layer)] for layer in "01")
            one[kind], other[kind] = other[kind], one[kind]

        as_of_before(directory, exchange)
        with pytest.raises(CheckpointError, match=f"{kind} of decoder.layers.0.* as loaded is not what was saved"):
            load_checkpoint(directory, trainer)


def test_the_digest_is_of_values_in_any_order_and_of_every_bit() -> None:
    from sparsecod_megatron.checkpoint.digests import tensor_digest

    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    whole, *parts = (int(tensor_digest(part)) for part in (values, values[:9], values[9:]))
    assert whole == int(tensor_digest(values.flip(0))) == sum(parts)
    for bit in range(32):
        other = values.clone()
        other.view(torch.int32)[777] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert int(tensor_digest(other)) != whole
    shifted = torch.cat((values[3:], values[:2], torch.zeros(1)))
    assert int(tensor_digest(shifted)) != whole
