"""Experts per token that change at a step: when, what follows, and the same as a restart with the new numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.seams.mechanism import model_at
from sparsecod_megatron.seams.plugin import StepContext
from tests.helpers.cli import read_jsonl, sparsecod
from tests.helpers.megatron import SMALL
from tests.helpers.text import write_corpus
from tests.helpers.training import small_trainer, trainer_batches

select_backend()
EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_router_pre_softmax=true",
    "model.moe_router_topk_per_layer=[3,2,2]",
)
LATER = "[1,1,2]"
EXPERT_FLOPS = 3 * 32 * 24 * 2 * 3
"""Three matrices, a product and a sum a number, forward and twice backward."""
SCHEDULE = f"mechanisms.moe_router_topk_schedule={{at: 2, topk_per_layer: {LATER}}}"


@pytest.mark.parametrize(("at", "last_before"), [(0.5, 5), (0.24, 2), (0.26, 3), (7, 7), (1, 1)])
def test_switches_after_its_step(at: float, last_before: int) -> None:
    schedule = f"mechanisms.moe_router_topk_schedule={{at: {at}, topk: 1}}"
    config = load_config(None, [*SMALL, *EXPERTS, schedule], mechanisms=MECHANISMS)
    numbers = [[model_at(config, StepContext(step, 10)).topk(layer) for layer in range(3)] for step in range(11)]
    assert numbers == [[3, 2, 2]] * (last_before + 1) + [[1, 1, 1]] * (10 - last_before)
    assert model_at(config, StepContext(0, 10)) is config.model


def steps(trainer: Any, first: int, count: int) -> list[str]:
    """Losses bit by bit of steps from `first` (counted from 0) on, over the data that belong to them."""
    from sparsecod_megatron.train.step import train_step

    data = trainer_batches(trainer)
    for _ in range(first * trainer.num_microbatches(trainer.config.train.global_batch_size)):
        next(data[0])
    return [train_step(trainer, data).loss.hex() for _ in range(count)]


def states(trainer: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(group without its parameters, state) of each parameter of each optimizer."""
    from sparsecod_megatron.parallel.owned_slices import working_parts

    return [
        ({key: value for key, value in group.items() if key != "params"}, part.optimizer.state[parameter], group)
        for part in working_parts(trainer.optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]


def test_equals_a_restart_with_the_new_numbers() -> None:
    """Weights, moments and step count of two steps, given to a model that was built with the later numbers."""
    with small_trainer(*EXPERTS, SCHEDULE) as trainer:
        expected = steps(trainer, 0, 4)
        weights = [parameter.detach().clone() for parameter in trainer.models[0].parameters()]
        assert trainer.plugins[0].metrics(trainer.context(2)) == {"experts_per_token": 7 / 3}
        assert trainer.plugins[0].metrics(trainer.context(3)) == {"experts_per_token": 4 / 3}
    with small_trainer(*EXPERTS) as trainer:
        assert steps(trainer, 0, 2) == expected[:2] != expected[2:]
        kept = [parameter.detach().clone() for parameter in trainer.models[0].parameters()]
        moments = [
            ({**group}, {key: value.clone() for key, value in state.items()}) for group, state, _ in states(trainer)
        ]
    with small_trainer(*EXPERTS, f"model.moe_router_topk_per_layer={LATER}") as trainer:
        steps(trainer, 0, 1)  # makes the moments, and fills every buffer with something else
        with torch.no_grad():
            for parameter, value in zip(trainer.models[0].parameters(), kept, strict=True):
                parameter.copy_(value)
        trainer.optimizer.reload_model_params()
        for (_, state, group), (old_group, old) in zip(states(trainer), moments, strict=True):
            group.update(old_group)
            for key, value in old.items():
                state[key].copy_(value)
        trainer.scheduler.step(increment=1)
        assert steps(trainer, 2, 2) == expected[2:]
        assert all(map(torch.equal, weights, trainer.models[0].parameters()))


@pytest.mark.parametrize(("step", "numbers"), [(2, [3, 2, 2]), (3, [1, 1, 2])])
def test_a_checkpoint_is_exported_with_the_numbers_of_its_step(step: int, numbers: list[int], tmp_path: Path) -> None:
    """Verified against Megatron-Core with them."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    with small_trainer(*EXPERTS, SCHEDULE, "model.init_method_std=0.1") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=step))
    assert export_checkpoint(saved, tmp_path / "hf") is not None
    assert json.loads((tmp_path / "hf/config.json").read_text())["moe_router_topk_per_layer"] == numbers


def test_operations_follow() -> None:
    """Half of the steps with 7 experts' products over three layers, half with 4, forward and backward."""
    from sparsecod_megatron.studies.budget import training_flops_per_token

    schedule = SCHEDULE.replace("at: 2", "at: 0.5")
    config = load_config(None, [*SMALL, *EXPERTS, schedule], mechanisms=MECHANISMS)
    before = flops_per_token(ParameterTable.of(config), 16)
    assert training_flops_per_token(config) == pytest.approx(before - 0.5 * 3 * EXPERT_FLOPS)


def test_the_line_of_metrics_has_the_operations_of_its_step(tmp_path: Path) -> None:
    """TFLOP/s over tokens/s: three experts' products fewer, forward and backward, from the step after the switch on."""
    from sparsecod_megatron.train import run_training

    write_corpus(tmp_path / "text", documents=16)
    prefix = tmp_path / "data" / "corpus"
    sparsecod("data", "--input", tmp_path / "text", "--tokenizer", "train:300", "--output", prefix, "--workers", "1")
    data = (f"data.prefix={prefix}", "data.seq_length=16", "model.vocab_size=null", "train.train_steps=4")
    run = (
        f"logging.run_dir={tmp_path / 'run'}",
        "logging.log_interval=1",
        "schedule.lr_warmup_steps=0",
        "train.eval_interval=0",
    )
    config = load_config(None, [*SMALL, *EXPERTS, SCHEDULE, *data, *run], mechanisms=MECHANISMS)
    run_training(config, select_backend())
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    numbers = [record["tflops"] * 1e12 / record["tokens_per_s"] for record in records]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert numbers[:2] == pytest.approx([numbers[0]] * 2) and numbers[2:] == pytest.approx([numbers[3]] * 2)
    assert numbers[0] - numbers[3] == pytest.approx(3 * EXPERT_FLOPS, rel=1e-6)


@pytest.mark.parametrize("masks", ["sparse_weights={density: 0.5}", "ste={}"])
def test_effective_operations_follow_too(masks: str) -> None:
    """Of each expert's products half: of a step by what the run reports, of a run by what studies match."""
    from sparsecod_megatron.studies.budget import training_flops_per_token

    kinds = f"mechanisms.{masks.split('=')[0]}.kinds=[mlp_input,mlp_output]"
    overrides = (*EXPERTS, SCHEDULE.replace("at: 2", "at: 0.5"), f"mechanisms.{masks}", kinds, "train.train_steps=4")
    with small_trainer(*overrides) as trainer:
        plugin = trainer.plugins[-1]
        numbers = [plugin.metrics(trainer.context(step))["effective_flops_per_token"] for step in (1, 2, 3, 4)]
        config = trainer.config
    assert numbers[0] == numbers[1] and numbers[2] == numbers[3]
    assert numbers[0] - numbers[3] == pytest.approx(3 * EXPERT_FLOPS / 2, rel=1e-6)
    real, idle = training_flops_per_token(config), 5.5 * EXPERT_FLOPS / 2
    assert real - training_flops_per_token(config, is_effective=True) == pytest.approx(idle, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([SCHEDULE], "model.num_moe_experts: null, but mechanisms.moe_router_topk_schedule is of experts"),
        (
            [*EXPERTS, SCHEDULE.replace("[1,1,2]", "[1,1]")],
            "after the switch model.moe_router_topk_per",
        ),
        ([*EXPERTS, SCHEDULE.replace("[1,1,2]", "[1,1,5]")], "5 is more than model.num_moe_experts=4"),
        ([*EXPERTS, SCHEDULE, "model.moe_router_pre_softmax=false"], "set model.moe_router_pre_softmax=true"),
        ([*EXPERTS, SCHEDULE.replace("at: 2", "at: 2.5")], "2.5 is neither a share below 1 nor a whole step"),
        ([*EXPERTS, SCHEDULE, "megatron.moe_token_dispatcher_type=allgather"], "allgather keeps the first numbers"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert words in str(refused.value) and "\n" not in str(refused.value)
