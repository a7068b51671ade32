"""A step that is no number changes nothing, and each policy does what it says; spikes are left out when asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from tests.helpers.cli import read_jsonl, sparsecod
from tests.helpers.text import write_corpus
from tests.helpers.training import poisoned, small_trainer, trainer_batches

if TYPE_CHECKING:
    from sparsecod_megatron.train.divergence import UpdateJudge, Verdict
    from sparsecod_megatron.train.setup import Trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU runs bit for bit")

CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 48}
precision: {dtype: fp32}
data: {prefix: %s, seq_length: 16}
train: {train_steps: 12, global_batch_size: 4, micro_batch_size: 4, eval_interval: 0}
statistics: {norms: {interval: 1}, spikes: {interval: 1}}
checkpoint: {save_interval: 4}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.spike_window=4"], "train.spike_window: 4 steps are too few"),
        (["train.spike_window=0", "train.spike_skip=true"], "train.spike_skip: true"),
        (["train.on_divergence=rollback", "checkpoint.save_interval=0"], "no checkpoint to go back to"),
        (["train.on_divergence=ignore"], "not one of stop, skip, rollback"),
    ],
)
def test_policies_that_cannot_act_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def judge(trainer: Trainer, state: dict[str, Any] | None = None) -> UpdateJudge:
    from sparsecod_megatron.train.divergence import UpdateJudge

    return UpdateJudge(trainer.config.train, state or {})


def tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of weights and moments."""
    moments = [
        tensor
        for part in trainer.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for tensor in (state["exp_avg"], state["exp_avg_sq"])
    ]
    return [tensor.detach().clone() for tensor in (*trainer.models[0].parameters(), *moments)]


def poisoning(batches: Iterator[dict[str, Any]], steps: set[int], per_step: int = 2) -> Iterator[dict[str, Any]]:
    """The batches, those of `steps` (from 1) with a loss that is no number."""
    for index, batch in enumerate(batches):
        yield poisoned(batch) if index // per_step + 1 in steps else batch


def test_a_skipped_step_changes_no_weight_and_no_moment() -> None:
    from sparsecod_megatron.train.step import train_step

    with small_trainer("train.on_divergence=skip") as trainer:
        data, decide = [poisoning(trainer_batches(trainer)[0], {3})], judge(trainer)
        updates, snapshots = [], [tensors(trainer)]
        for _ in range(4):
            updates.append(train_step(trainer, data, judge=decide).verdict.update)
            snapshots.append(tensors(trainer))
        assert trainer.optimizer.chained_optimizers[0].optimizer.param_groups[0]["step"] == 3
    assert updates == [True, True, False, True]
    for step, (before, after) in enumerate(zip(snapshots[1:], snapshots[2:], strict=False), start=2):
        same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert same is (step == 3), step
    assert all(bool(tensor.isfinite().all()) for tensor in snapshots[-1])


def test_stop_raises_before_the_weights_change() -> None:
    from sparsecod_megatron.train.divergence import DivergenceError
    from sparsecod_megatron.train.step import train_step

    with small_trainer() as trainer:
        data, decide = [poisoning(trainer_batches(trainer)[0], {1})], judge(trainer)
        before = [parameter.detach().clone() for parameter in trainer.models[0].parameters()]
        with pytest.raises(DivergenceError, match="loss nan.*lower optimizer.lr"):
            train_step(trainer, data, judge=decide)
        after = list(trainer.models[0].parameters())
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_skips_in_a_row_have_a_limit_that_survives_a_resume() -> None:
    from sparsecod_megatron.train.divergence import DivergenceError

    with small_trainer("train.on_divergence=skip", "train.max_divergences=2") as trainer:
        decide = judge(trainer)
        for loss, update in ((3.0, True), (math.nan, False), (math.inf, False), (3.0, True), (math.nan, False)):
            assert decide(loss, 1.0).update is update
        resumed = judge(trainer, json.loads(json.dumps(decide.state())))
        assert not resumed(math.nan, 1.0).update
        with pytest.raises(DivergenceError, match="3 steps in a row diverged"):
            resumed(3.0, math.nan)


def verdicts(decide: UpdateJudge, losses: list[float]) -> list[Verdict]:
    return [decide(loss, 1.0) for loss in losses]


@pytest.mark.parametrize("skip", [False, True])
def test_spikes_are_marked_and_left_out_only_when_asked(skip: bool) -> None:
    losses = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.0, 3.1, 9.0, 3.0]
    with small_trainer("train.spike_window=8", f"train.spike_skip={str(skip).lower()}") as trainer:
        found = verdicts(judge(trainer), losses)
    assert [verdict.spike for verdict in found] == [loss == 9.0 for loss in losses]
    assert [verdict.update for verdict in found] == [not (skip and loss == 9.0) for loss in losses]


def test_a_level_is_not_skipped_for_ever() -> None:
    with small_trainer("train.spike_window=32", "train.spike_skip=true", "train.max_divergences=3") as trainer:
        found = verdicts(judge(trainer), [3.0, 3.1] * 16 + [9.0] * 5)
    assert [verdict.update for verdict in found[32:]] == [False, False, False, True, False]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a configuration."""
    folder = tmp_path_factory.mktemp("divergence")
    write_corpus(folder / "text", documents=16)
    prefix = folder / "data" / "corpus"
    sparsecod("data", "--input", folder / "text", "--tokenizer", "train:300", "--output", prefix, "--workers", "1")
    (folder / "config.yaml").write_text(CONFIG % prefix)
    return folder


def trained(world: Path, name: str, *overrides: str, poison: tuple[int, ...] = ()) -> Path:
    """Train in this process, the data of the steps `poison` giving a loss that is no number."""
    run = world / name
    config = load_config(world / "config.yaml", [f"logging.run_dir={run}", *overrides])
    backend = select_backend()
    from sparsecod_megatron.train import run_training
    from sparsecod_megatron.train.data import RunData

    original = RunData.train_batches

    def batches(self: RunData, consumed_samples: int) -> list[Iterator[dict[str, torch.Tensor]]]:
        done = consumed_samples // config.train.global_batch_size
        steps = {step - done for step in poison}
        return [poisoning(iterator, steps, per_step=1) for iterator in original(self, consumed_samples)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunData, "train_batches", batches)
        run_training(config, backend)
    return run


def by_step(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_jsonl(run / "metrics.jsonl")}


def test_rollback_goes_on_from_the_checkpoint_behind_the_data(world: Path) -> None:
    """Step 8 on, with the weights of step 4 and data that follows: as a run whose state was put so by hand."""
    from sparsecod_megatron.checkpoint.manifest import write_manifest

    run = trained(world, "rollback", "train.on_divergence=rollback", poison=(7,))
    records = by_step(run)
    assert sorted(records) == list(range(1, 13))
    assert records[7]["diverged"] and records[7]["rolled_back_to_step"] == 4 and "loss" not in records[7]
    assert json.loads((run / "checkpoints/step_00000012/state.json").read_text())["train"]["optimizer_steps"] == 9
    assert 7 not in {record["step"] for record in read_jsonl(run / "layer_statistics.jsonl")}

    twin = trained(world, "twin", "train.exit_step=4")
    path = twin / "checkpoints/step_00000004/state.json"
    state = json.loads(path.read_text())
    state["train"] |= {"step": 7, "consumed_samples": 28}
    state["scheduler"]["num_steps"] = 7
    path.write_text(json.dumps(state))
    write_manifest(path.parent, {})
    trained(world, "twin")
    expected = by_step(twin)
    for step in range(8, 13):
        assert [records[step][name] for name in ("loss", "grad_norm", "lr")] == [
            expected[step][name] for name in ("loss", "grad_norm", "lr")
        ]


def test_rollback_without_a_checkpoint_and_without_end(world: Path) -> None:
    from sparsecod_megatron.train.divergence import DivergenceError

    overrides = ("train.on_divergence=rollback", "train.max_divergences=2")
    with pytest.raises(DivergenceError, match="step 3 diverged before the first checkpoint"):
        trained(world, "early", *overrides, poison=(3,))
    with pytest.raises(DivergenceError, match="diverged 3 times after the checkpoint of step 4"):
        trained(world, "endless", *overrides, "checkpoint.save_interval=4", poison=(5, 6, 7))


def test_skip_goes_on_and_says_so(world: Path) -> None:
    run = trained(world, "skip", "train.on_divergence=skip", "logging.log_interval=5", poison=(7,))
    records = by_step(run)
    assert sorted(records) == [1, 5, 7, 10, 12]
    assert records[7] | {"diverged": True, "skipped": True} == records[7]
    assert math.isfinite(records[12]["loss"])


def test_a_run_that_stops_is_one_line(world: Path) -> None:
    """A learning rate beyond all numbers, through the command line."""
    line = sparsecod(
        "train",
        world / "config.yaml",
        f"logging.run_dir={world / 'stop'}",
        "optimizer.lr=1e38",
        "optimizer.clip_grad=0",
        check=False,
    )
    assert line.returncode == 2, line.stderr
    assert "lower optimizer.lr or look at the data" in line.stderr.splitlines()[-1]
    assert "Traceback" not in line.stderr
