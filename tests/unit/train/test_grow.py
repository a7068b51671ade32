"""A grown run has its layers' weights, fp32 weights and moments where the map says, and continues where it was."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend

BACKEND = select_backend()

from sparsecod_megatron.checkpoint.state import read_state, saved_config  # noqa: E402
from sparsecod_megatron.checkpoint.stream import CheckpointTensors  # noqa: E402
from sparsecod_megatron.cli.main import main  # noqa: E402
from tests.helpers.training import small_trainer, trainer_batches  # noqa: E402

EXPERTS = (
    "model.num_layers=4",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_first_k_dense_layers=1",
    "model.moe_router_topk_per_layer=[1,2,3,4]",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_bias_update_rate=0.1",
)
KINDS = (None, "param", "exp_avg", "exp_avg_sq")


def trained_run(folder: Path, *overrides: str, steps: int = 2) -> Path:
    """A run's directory with one checkpoint of a few steps."""
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    with small_trainer("model.init_method_std=0.2", *overrides) as trainer:
        data = trainer_batches(trainer)
        for _ in range(steps):
            train_step(trainer, data)
        state = TrainState(step=steps, optimizer_steps=steps, consumed_samples=4 * steps, consumed_tokens=64 * steps)
        save_checkpoint(folder / "checkpoints", trainer, state=state)
    return folder


def grow(run: Path, output: Path, layers: str, *arguments: str) -> int:
    return main(["grow", str(run), "--layers", layers, "--output", str(output), *arguments])


def stored(run: Path) -> dict[str | None, dict[str, Tensor]]:
    """Every tensor of a run's checkpoint, by the optimizer's kind (None: the model's) and name."""
    (step,) = (run / "checkpoints").glob("step_*")
    with ExitStack() as files:
        return {kind: {n: t.clone() for n, t in CheckpointTensors(step, files, kind).items()} for kind in KINDS}


def source_of(name: str, layers: list[int]) -> str:
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{layers[int(found[1])]}", name)


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [((), [0, 1, 2, 1, 2]), (EXPERTS, [0, 1, 3, 2, 2, 3]), (("precision.dtype=bf16",), [0, 0, 2])],
    ids=["dense", "experts", "bf16"],
)
def test_every_tensor_is_its_sources(overrides: tuple[str, ...], layers: list[int], tmp_path: Path) -> None:
    run, grown = trained_run(tmp_path / "run", *overrides), tmp_path / "grown"
    assert grow(run, grown, ",".join(map(str, layers))) == 0
    before, after = stored(run), stored(grown)
    for kind in KINDS:
        sources = {source_of(name, layers) for name in after[kind]}
        assert sources and all(
            torch.equal(tensor, before[kind][source_of(name, layers)]) for name, tensor in after[kind].items()
        )
        places = {int(found[1]) for name in after[kind] if (found := re.search(r"layers\.(\d+)", name))}
        assert places == set(range(len(layers)))
    states = [read_state(next((folder / "checkpoints").glob("step_*"))) for folder in (run, grown)]
    assert states[0].train == states[1].train and states[0].scheduler == states[1].scheduler
    config = saved_config(next((grown / "checkpoints").glob("step_*")))
    if overrides == EXPERTS:
        assert config.model.moe_router_topk_per_layer == [1, 2, 4, 3, 3, 4]
    lineage = json.loads((grown / "grow.json").read_text())
    assert lineage["layers"] == layers and lineage["silenced"] == []


@pytest.mark.parametrize("overrides", [(), EXPERTS, ("model.norm_placement=peri",)], ids=["pre", "experts", "peri"])
def test_silent_copies_keep_the_logits_bit_for_bit(
    overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecod_megatron.checkpoint.whole import whole_model

    run, silent, loud = trained_run(tmp_path / "run", *overrides), tmp_path / "silent", tmp_path / "loud"
    layers = "0,1,2,1,2,3" if overrides == EXPERTS else "0,1,1,2,2"
    tokens, logits = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2)), []
    assert grow(run, silent, layers, "--silence") == 0
    told = capsys.readouterr().out
    assert "largest |Δlogit| 0 " in told.replace(",", " ").replace(";", " ")
    assert grow(run, loud, layers) == 0
    before, after = re.search(r"loss ([\d.]+) → ([\d.]+)", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert float(after) > float(before)
    for folder in (run, silent, loud):
        with whole_model(folder, BACKEND) as whole:
            logits.append(whole.logits(tokens))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    zeros = {name for name, moment in stored(silent)["exp_avg_sq"].items() if not moment.any()}
    places = {int(re.search(r"layers\.(\d+)", name)[1]) for name in zeros}  # type: ignore[index]
    assert places == {place for place, layer in enumerate(layers.split(",")) if layer in layers.split(",")[:place]}
    assert all(re.search(r"linear_proj|linear_fc2", name) for name in zeros)


def test_training_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the next batch, by the next learning rate, with copies that learn; `doctor` finds nothing."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.train.step import train_step

    def continued(run: Path, layers: int) -> tuple[list[float], list[Any]]:
        (step,) = (run / "checkpoints").glob("step_*")
        with small_trainer("model.init_method_std=0.2", f"model.num_layers={layers}", "train.seed=7") as trainer:
            assert load_checkpoint(step, trainer).step == 2
            steps = {group["step"] for group in trainer.optimizer.param_groups if group["params"]}
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            data = trainer_batches(trainer)
            losses = [train_step(trainer, data).loss for _ in range(3)]
            outputs = [weight for name, weight in trainer.models[0].named_parameters() if "linear_proj" in name]
            assert len(outputs) == layers and all(bool(weight.all()) for weight in outputs)
            return losses, [steps, rates]

    run = trained_run(tmp_path / "run")
    assert grow(run, tmp_path / "grown", "0,1,2,2,2", "--silence") == 0
    (before, place), (after, grown_place) = continued(run, 3), continued(tmp_path / "grown", 5)
    assert after[0] == before[0] and after[1] != before[1]
    assert grown_place[0] == place[0] == {2} and set(grown_place[1]) == set(place[1])
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "grown"), "--no-rehearsal"]) == 0
    assert re.search(r"moments +ok", capsys.readouterr().out)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, last = trained_run(tmp_path / "plain", steps=1), "0,1,2,2"
    cases: list[tuple[Path, str, tuple[str, ...], str]] = [
        (plain, "0,1,3", (), "--layers: 3 is not one of the model's 3 layers"),
        (plain, "0,x", (), "--layers 0,x: not numbers of layers"),
        (plain, "0,2,1", ("--silence",), "--silence: keeps what the model computes where each of its 3 layers"),
        (plain, "0,1,1", ("--silence",), "--silence: keeps what the model computes where each of its 3 layers"),
        (tmp_path / "nowhere", last, (), "nowhere"),
    ]
    for name, override, arguments, message in (
        ("post", "model.norm_placement=post", ("--silence",), "--silence: model.norm_placement=post normalises"),
        ("lns", "model.layernorm_scaling=true", (), "model.layernorm_scaling: true makes layer 3 another than layer 2"),
        ("mechanism", "mechanisms.scaled.branch=0.5", (), "mechanisms.scaled: may depend on a layer's place"),
        ("muon", "optimizer.optimizer=muon", (), "optimizer.optimizer: muon, but growing copies AdamW's moments alone"),
    ):
        cases.append((trained_run(tmp_path / name, override, steps=1), last, arguments, message))
    for run, layers, arguments, message in cases:
        assert grow(run, tmp_path / "grown", layers, *arguments) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
        assert not (tmp_path / "grown").exists()
