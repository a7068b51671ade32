"""Each method of weight sparsity against closed forms and brute force, and teachers whose live weights are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.weights.engine.patterns import smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.schedules import ramp, steps_of_compute
from sparsecod_megatron.mechanisms.weights.pgf import Pgf
from sparsecod_megatron.seams.plugin import StepContext
from tests.helpers.cli import free_port
from tests.helpers.megatron import SMALL
from tests.helpers.planted import planted_teacher, trained_student
from tests.helpers.training import small_trainer, trainer_batches

select_backend()
STEPS = "train.train_steps=8"


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one, for what is trained without Megatron-Core."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def found_support(effective: Tensor, teacher: Tensor) -> float:
    """Share of the teacher's live weights among the student's."""
    live = teacher != 0
    return ((effective != 0) & live).sum().item() / live.sum().item()


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("sparse_weights", ("density=0.1",), (0.0, 0.25)),
        ("set", ("density=0.1", "interval=5", "stop=1"), (0.3, 0.95)),
        ("rigl", ("density=0.1", "interval=5"), (1.0, 1.0)),
        ("journey", ("density=0.1", "interval=5", "unit=steps"), (1.0, 1.0)),
        ("iss", ("density=0.1",), (1.0, 1.0)),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_the_planted_weights_are_found(
    monkeypatch: pytest.MonkeyPatch, method: str, settings: tuple[str, ...], expected: tuple[float, float]
) -> None:
    """A tenth lives: the dynamic and gradual methods find all, random growth a part, a fixed mask what chance gives."""
    overrides = tuple(f"mechanisms.{method}.{setting}" for setting in settings)
    for seed in range(3):
        teacher = planted_teacher(0.1, seed)
        effective, _, _ = trained_student(monkeypatch, overrides, teacher, steps=400, seed=seed)
        assert int((effective != 0).sum()) <= round(0.1 * teacher.numel())
        assert expected[0] <= found_support(effective, teacher) <= expected[1], seed


@pytest.mark.parametrize("method", ["ste", "srste", "pgf", "cast"])
@pytest.mark.usefixtures("one_process")
def test_the_planted_pattern_is_found(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Of each four inputs the teacher uses two."""
    settings = {"cast": ("decay=0.002", "rise=0.5"), "srste": ("decay=0.01",)}.get(method, ("pattern='2:4'",))
    overrides = tuple(f"mechanisms.{method}.{setting}" for setting in settings)
    for seed in range(3):
        teacher = planted_teacher(1.0, seed)
        teacher[smallest_of_each(teacher, 2, 4)] = 0
        effective, _, _ = trained_student(monkeypatch, overrides, teacher, steps=400, seed=seed)
        assert torch.equal(effective != 0, teacher != 0), seed


def gradients(*overrides: str, weights: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
    """Reduced gradients of a first step by name, as plugins leave them; and the latent weights."""
    from sparsecod_megatron.train.passes import forward_backward

    with small_trainer(STEPS, *overrides) as trainer:
        model = trainer.models[0].module
        if weights is not None:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights[name])
        trainer.models[0].zero_grad_buffer()
        context = trainer.context(3)
        forward_backward(trainer, trainer_batches(trainer), context, samples=4, forward_only=False)
        for plugin in trainer.plugins:
            plugin.on_gradients(context)
        parameters = dict(model.named_parameters())
        found = {name: weight.main_grad.clone() for name, weight in parameters.items()}  # type: ignore[attr-defined]
        return found, {name: weight.detach().clone() for name, weight in parameters.items()}


FULL_RECOMPUTE = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)


@pytest.mark.parametrize("how", [(), FULL_RECOMPUTE, ("megatron.gradient_accumulation_fusion=false",)])
@pytest.mark.parametrize("method", ["ste", "srste", "pgf"])
def test_gradients_are_those_of_the_masked_model(method: str, how: tuple[str, ...]) -> None:
    """Bit for bit those of a dense model with the masked weights, with λ (1 − m) W or times m + (1 − m) β."""
    settings = {
        "ste": ("mechanisms.ste.pattern='2:4'",),
        "srste": ("mechanisms.srste.decay=0.3",),
        "pgf": ("mechanisms.pgf.dense_until=0", "mechanisms.pgf.binary_from=0.5"),
    }[method]
    ours, latent = gradients(*settings, *how)
    beta = 0.5 if method == "pgf" else 0.0  # of step 3 of 8: two quarters of the way have been gone
    dead = {name: smallest_of_each(weight, 2, 4) for name, weight in latent.items() if ".linear_" in name}
    dead = {name: mask for name, mask in dead.items() if mask.dim() == 2}
    masked = {
        name: torch.where(dead[name], weight * beta, weight) if name in dead else weight
        for name, weight in latent.items()
    }
    dense, _ = gradients(*how, weights=masked)
    assert dead
    for name, gradient in dense.items():
        expected = gradient
        if name in dead and method == "srste":
            expected = gradient + 0.3 * (latent[name] * dead[name])
        elif name in dead and method == "pgf":
            expected = gradient * (1 - (1 - beta) * dead[name])
        rounding = {"rtol": 0, "atol": 0} if method == "ste" else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(ours[name], expected, **rounding, msg=name)


def test_patterns_get_harsher_in_the_order_of_the_paper() -> None:
    """1:16 over ten steps, and a pattern that is no power of two below its m."""
    settings = Pgf(pattern="1:16", flow="sdgf", dense_until=0.0, binary_from=1.0)
    assert [settings.n_and_m(StepContext(step, 10))[0] for step in range(1, 11)] == [15, 15, 8, 8, 4, 4, 2, 2, 1, 1]
    assert Pgf(pattern="3:4").stages() == [3] and Pgf(pattern="2:4").stages() == [3, 2]
    fading = Pgf(pattern="2:4", dense_until=0.2, binary_from=0.6)
    assert fading.n_and_m(StepContext(2, 10)) == (4, 4) and fading.n_and_m(StepContext(3, 10)) == (2, 4)
    factors = [fading.dead_factor(StepContext(step, 10)) for step in (3, 5, 7, 10)]
    assert factors == pytest.approx([1, 0.5, 0, 0])


@pytest.mark.parametrize("kind", ["cubic", "linear"])
def test_the_ramp_begins_and_ends_at_shares_of_compute(kind: str) -> None:
    """By running it, compute being what lives; in steps the mean density is 1 − 0.625 S (cubic) or 1 − 0.5 S."""
    steps, sparsity = 20_000, 0.8
    start, end = steps_of_compute(0.25, 0.75, sparsity=sparsity, kind=kind)
    at = (np.arange(steps) + 0.5) / steps
    compute = np.cumsum([1 - sparsity * ramp(share, start=start, end=end, kind=kind) for share in at])
    reached = compute / compute[-1]
    assert reached[int(start * steps)] == pytest.approx(0.25, abs=1e-3)
    assert reached[int(end * steps)] == pytest.approx(0.75, abs=1e-3)
    mean = np.mean([1 - sparsity * ramp(share, start=0.25, end=0.75, kind=kind) for share in at])
    assert mean == pytest.approx(1 - {"cubic": 0.625, "linear": 0.5}[kind] * sparsity, abs=1e-4)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_gradual_pruning_is_top_k(scope: str) -> None:
    """After each update, by a sort of the weights before it; what has died stays dead, and N̄ is what lived."""
    from sparsecod_megatron.train.step import train_step

    journey = ("density=0.25", f"scope={scope}", "start=0.2", "end=0.7", "unit=steps", "interval=2")
    overrides = tuple(f"mechanisms.journey.{setting}" for setting in journey)
    with small_trainer(STEPS, *overrides) as trainer:
        model, data = trainer.models[0].module, trainer_batches(trainer)
        names = [name for name, weight in model.named_parameters() if ".linear_" in name and weight.dim() == 2]
        parameters = dict(model.named_parameters())
        total, lived, dead_before = sum(parameters[name].numel() for name in names), [], 0
        for step in range(1, 9):
            before = {name: parameters[name].detach().abs().clone() for name in names}
            train_step(trainer, data)
            after = {name: parameters[name].detach() == 0 for name in names}
            share = ramp(step / 8, start=0.2, end=0.7, kind="cubic")
            if step in (2, 4, 6):  # the first of the ramp, every second one after it, and its end
                groups = [names] if scope == "global" else [[name] for name in names]
                for group in groups:
                    sizes = [parameters[name].numel() for name in group]
                    wanted = sum(round(share * (size - round(0.25 * size))) for size in sizes)
                    magnitudes, marks = (
                        torch.cat([values[name].flatten() for name in group]) for values in (before, after)
                    )
                    order = magnitudes.argsort(stable=True)
                    assert bool(marks[order[:wanted]].all()) and int(marks.sum()) == wanted, step
            dead = sum(int(mask.sum()) for mask in after.values())
            assert dead >= dead_before and all(bool((before[name] > 0).any()) for name in names)
            dead_before, lived = dead, [*lived, total - dead]
        metrics = trainer.plugins[0].metrics(trainer.context(8))
        others = ParameterTable.of(trainer.config).count().total - total
        assert metrics["mean_live_parameters"] == pytest.approx(others + np.mean(lived))
        assert metrics["live_share"] == pytest.approx(lived[-1] / total)
        assert lived[-1] == pytest.approx(total / 4, rel=1e-3)


def test_rigl_is_brute_force() -> None:
    """On one process: by two sorts of each matrix; counts never change, and what grows starts at zero."""
    from sparsecod_megatron.train.passes import forward_backward
    from sparsecod_megatron.train.step import train_step

    overrides = ("mechanisms.rigl.density=0.3", "mechanisms.rigl.interval=2", "mechanisms.rigl.drop_fraction=0.4")
    with small_trainer(STEPS, *overrides, "optimizer.clip_grad=0") as trainer:
        (plugin,), model = trainer.plugins, trainer.models[0].module
        data = trainer_batches(trainer)
        train_step(trainer, data)
        weights = {
            name: weight for name, weight in model.named_parameters() if ".linear_" in name and weight.dim() == 2
        }
        old = {piece.shard.matrix.name: ~piece.marked for piece in plugin.places.pieces}
        before = {name: weight.detach().flatten().clone() for name, weight in weights.items()}
        # The same micro-batches twice: their gradients first, then the step.
        batches = [[next(iterator) for _ in range(2)] for iterator in data]
        trainer.models[0].zero_grad_buffer()
        again = [iter(part) for part in batches]
        forward_backward(trainer, again, trainer.context(2), samples=4, forward_only=False)
        dense = {name: weight.main_grad.flatten().clone() for name, weight in weights.items()}  # type: ignore[attr-defined]
        train_step(trainer, [iter(part) for part in batches])
        share = 0.4 / 2 * (1 + math.cos(math.pi * 2 / (0.75 * 8)))
        for piece in plugin.places.pieces:
            name = piece.shard.matrix.name
            live, after = int(old[name].sum()), weights[name].detach().flatten()
            moved = int(share * live)
            order = torch.where(old[name], before[name].abs(), -1).argsort(descending=True)
            kept = torch.zeros_like(old[name])
            kept[order[: live - moved]] = True
            grown = torch.zeros_like(kept)
            grown[torch.where(kept, -1, dense[name].abs()).argsort(descending=True)[:moved]] = True
            assert torch.equal(~piece.marked, kept | grown) and int((kept | grown).sum()) == live
            fresh = grown & ~old[name]
            assert moved > 0 and bool(fresh.any())
            assert not bool(after[fresh | piece.marked].any()) and bool(after[kept].all())
            assert not any(bool(moment[fresh | piece.marked].any()) for moment in piece.moments)


def test_a_step_without_update_chooses_later() -> None:
    """Masks, weights and moments stay, and the next step does what this one did not."""
    from sparsecod_megatron.train.divergence import Verdict
    from sparsecod_megatron.train.step import train_step

    overrides = ("mechanisms.rigl.density=0.3", "mechanisms.rigl.interval=2")
    with small_trainer(STEPS, *overrides) as trainer:
        (plugin,), data = trainer.plugins, trainer_batches(trainer)
        train_step(trainer, data)
        masks = [piece.marked.clone() for piece in plugin.places.pieces]
        weights = [weight.detach().clone() for weight in trainer.models[0].parameters()]
        train_step(trainer, data, judge=lambda loss, norm: Verdict(update=False))
        assert all(map(torch.equal, masks, (piece.marked for piece in plugin.places.pieces)))
        assert all(map(torch.equal, weights, trainer.models[0].parameters()))
        train_step(trainer, data)
        assert not any(map(torch.equal, masks, (piece.marked for piece in plugin.places.pieces)))


def test_soft_shrinkage_multiplies_the_smallest() -> None:
    """After one update, against the same step without a factor; and zeros of the same number once it freezes."""
    from sparsecod_megatron.train.step import train_step

    def stepped(*settings: str, steps: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        overrides = tuple(f"mechanisms.iss.{setting}" for setting in ("density=0.3", *settings))
        with small_trainer("train.train_steps=4", *overrides) as trainer:
            pieces, data = trainer.plugins[0].places.pieces, trainer_batches(trainer)
            before = [piece.master.clone() for piece in pieces]
            for _ in range(steps):
                train_step(trainer, data)
            return before, [piece.master.clone() for piece in pieces]

    (before, shrunk), (_, plain) = stepped("factor=0.5"), stepped("factor=1")
    for old, new, dense in zip(before, shrunk, plain, strict=True):
        small = torch.zeros_like(old, dtype=torch.bool)
        small[old.abs().argsort()[: len(old) - round(0.3 * len(old))]] = True
        torch.testing.assert_close(new, torch.where(small, dense * 0.5, dense), rtol=1e-6, atol=0)
    _, frozen = stepped("freeze=0.5", steps=4)
    assert all(int((weight != 0).sum()) == round(0.3 * len(weight)) for weight in frozen)


def test_cast_draws_to_zero_without_passing_it() -> None:
    """The proximal step in closed form; what the mask keeps is bit for bit AdamW's."""
    from sparsecod_megatron.train.step import train_step

    def stepped(decay: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        overrides = (f"mechanisms.cast.decay={decay}", "mechanisms.cast.rise=0.125", "schedule.lr_decay_style=constant")
        with small_trainer(STEPS, *overrides) as trainer:
            train_step(trainer, trainer_batches(trainer))
            pieces = trainer.plugins[0].places.pieces
            return [(piece.master.clone(), piece.marked.clone(), piece.moments[1].clone()) for piece in pieces]

    crossed, left, eps = 0, 0, load_config(None, SMALL, mechanisms=MECHANISMS).optimizer.adam_eps
    for (ours, marked, variance), (plain, _, _) in zip(stepped(0.002), stepped(0.0), strict=True):
        assert torch.equal(ours[~marked], plain[~marked]) and marked.float().mean().item() == 0.5
        threshold = 1e-2 * 0.002 / ((variance / (1 - 0.95)).sqrt() + eps)
        expected = torch.sign(plain) * (plain.abs() - threshold).clamp(min=0)
        # Where little is left of a weight, what is left has the rounding of the weight, of up to 0.06.
        torch.testing.assert_close(ours[marked], expected[marked], rtol=1e-5, atol=4e-9)
        crossed += int((ours[marked] == 0).sum())
        left += int((ours[marked] != 0).sum())
    assert crossed > 100 and left > 100


def test_dense_after_sparse() -> None:
    """All weights live after the switch, start at zero, and have the dense model's gradient."""
    from sparsecod_megatron.train.step import train_step

    with small_trainer(STEPS, "mechanisms.spdf.density=0.3", "mechanisms.spdf.dense_after=0.5") as trainer:
        (plugin,), data = trainer.plugins, trainer_batches(trainer)
        for _ in range(4):
            masks = [piece.marked.clone() for piece in plugin.places.pieces]
            train_step(trainer, data)
        pairs = list(zip(plugin.places.pieces, masks, strict=True))
        assert all(bool(dead.any()) and not bool(piece.master[dead].any()) for piece, dead in pairs)
        assert not any(bool(moment[dead].any()) for piece, dead in pairs for moment in piece.moments)
        assert plugin.metrics(trainer.context(4))["live_share"] == 1.0
        train_step(trainer, data)
        assert all(bool((piece.master[dead] != 0).float().mean() > 0.9) for piece, dead in pairs)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.srste.pattern='5:7'"], "pattern: 5:7 has groups of 7, which do not divide the 32 inputs of qkv"),
        (["mechanisms.ste.pattern='4:2'"], "'4:2' is not a pattern n:m"),
        (
            ["mechanisms.ste.pattern='2:4'", "model.ffn_hidden_size=36", "parallel.tensor_model_parallel_size=2"],
            "inputs of mlp_output over parallel.tensor_model_parallel_size=2",
        ),
        (
            ["mechanisms.rigl={}", "mechanisms.srste={}"],
            "srste: beside mechanisms.rigl, and both act on layer 0",
        ),
        (["mechanisms.srste={}", "optimizer.optimizer=muon"], "optimizer.optimizer: muon"),
        (["mechanisms.rigl.skip_layers=[3]"], "skip_layers: 3 is not a layer; give numbers from 0 to 2"),
        (["mechanisms.journey.start=0.8"], "start: 0.8 is above mechanisms.journey.end=0.75"),
        (["mechanisms.pgf.dense_until=0.9"], "is not below mechanisms.pgf.binary_from=0.9"),
        (["mechanisms.spdf={}", "optimizer.adam_beta2=0.999"], "adam_beta2: 0.999 with mechanisms.spdf.dense_after"),
        (["mechanisms.journey={scope: global, distribution: erk}"], "means nothing with scope=global"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    from sparsecod_megatron.errors import ConfigError

    with pytest.raises(ConfigError) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_exported_is_what_the_model_computes(tmp_path: Path) -> None:
    """The loss of the files' model is the run's own, inside its window; the sidecar says what is zero in them."""
    from transformers import AutoModelForCausalLM

    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import evaluate, train_step

    with small_trainer(STEPS, "mechanisms.srste.skip_layers=[1]", "model.init_method_std=0.2") as trainer:
        data = trainer_batches(trainer)
        train_step(trainer, data)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
        batches = [next(data[0]) for _ in range(2)]
        ours = evaluate(trainer, [iter(batches)], num_steps=1)
        assert all(bool(weight.any()) for weight in trainer.models[0].parameters())
    export_checkpoint(saved, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    losses = []
    for batch in batches:
        logits = model(batch["tokens"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item())
    assert np.mean(losses) == pytest.approx(ours, rel=1e-5)
    sidecar = json.loads((tmp_path / "hf" / "sparsity.json").read_text())
    assert sidecar["pattern"] == "2:4" and sidecar["mechanisms"]["srste"]["skip_layers"] == [1]
    assert set(sidecar["live_share"].values()) == {0.5}
    assert {int(name.split(".")[2]) for name in sidecar["live_share"]} == {0, 2}
    weights = dict(model.named_parameters())
    assert all(int((weights[name] == 0).sum()) * 2 == weights[name].numel() for name in sidecar["live_share"])


def test_a_pattern_is_promised_where_its_mechanism_is(tmp_path: Path) -> None:
    """Two in one run, each with layers of its own: zeros of the other follow no pattern, and need not."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    overrides = ("mechanisms.ste.skip_layers=[1,2]", "mechanisms.sparse_weights.skip_layers=[0]")
    with small_trainer(*overrides) as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState())
    export_checkpoint(saved, tmp_path / "hf", verify=False)
    sidecar = json.loads((tmp_path / "hf" / "sparsity.json").read_text())
    assert sidecar["pattern"] == "2:4" and set(sidecar["mechanisms"]) == {"ste", "sparse_weights"}
    assert {int(name.split(".")[2]) for name in sidecar["live_share"]} == {0, 1, 2}
