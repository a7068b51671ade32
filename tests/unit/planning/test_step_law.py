"""What Step Law suggests, against its formula written out, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.planning.step_law import step_law
from tests.helpers.cli import sparsecod

DENSE, MOE = "examples/configs/dense_1B.yaml", "examples/configs/moe_1B_7B.yaml"


def test_formula(repo_root: Path) -> None:
    """Layers of a Llama model of the paper's shape: 7 of width 960, heads and three matrices of 9,368."""
    shape = [
        "model.hidden_size=960",
        "model.num_layers=7",
        "model.ffn_hidden_size=9368",
        "model.num_attention_heads=15",
    ]
    run = ["train.train_steps=10000", "train.global_batch_size=512", "data.seq_length=2048", "optimizer.lr=2e-3"]
    config = load_config(repo_root / DENSE, [*shape, *run, "schedule.min_lr_ratio=0.005"])
    found = step_law(config, ParameterTable.of(config).count())
    norms = 960 * (2 * 7 + 1)
    assert found.parameters == 214_663_680 + norms
    assert found.tokens == 10_000 * 512 * 2048
    assert found.lr == pytest.approx(1.79 * found.parameters**-0.713 * found.tokens**0.307)
    assert found.lr * found.lr_ratio == pytest.approx(2e-3)
    assert found.batch_tokens == pytest.approx(0.58 * found.tokens**0.571)
    assert found.batch_tokens * found.batch_ratio == pytest.approx(512 * 2048)
    assert found.caveats == ()


def test_experts_count_and_what_lies_outside_is_named(repo_root: Path) -> None:
    muon = ["optimizer.optimizer=muon", "train.train_steps=100", "schedule.lr_warmup_steps=0"]
    config = load_config(repo_root / MOE, [*muon, "train.rampup_batch_size=[64,64,1024]"])
    count = ParameterTable.of(config).count()
    found = step_law(config, count)
    assert found.parameters == count.total - count.embedding > count.active
    assert [caveat.split(" ")[0] for caveat in found.caveats] == ["N", "D", "optimizer", "a", "a"]
    assert "is above 1.1e+09" in found.caveats[0] and "is below 2e+09" in found.caveats[1]


def test_plan_prints_it(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    text = sparsecod("plan", DENSE, "--gpus", "16", "--output", output).stdout
    content = json.loads(output.read_text())["step_law"]
    (line,) = [line for line in text.splitlines() if line.startswith("Step Law")]
    assert f"lr {content['lr']:.2e} (the run's is {content['lr_ratio']:.2g} times that)" in line
    assert f"{content['batch_tokens']:,.0f} tokens (the run's is {content['batch_ratio']:.2g} times that)" in line
    assert content["caveats"] and all(caveat in line for caveat in content["caveats"])
