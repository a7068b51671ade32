"""What all cells have in common is equal to within half a step of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.studies import Cell, load_study
from sparsecod_megatron.studies.budget import training_flops_per_token
from tests.unit.studies.conftest import WriteStudy

LENGTHS = {
    "name": "length",
    "cells": {
        str(length): {"data.seq_length": length, "train.global_batch_size": 4, "train.micro_batch_size": 4}
        for length in (16, 64, 128)
    },
}
DEPTHS = {"name": "depth", "key": "model.num_layers", "values": [2, 5]}


def tokens(cell: Cell) -> int:
    return cell.config.train.train_steps * tokens_a_step(cell)


def tokens_a_step(cell: Cell) -> int:
    return cell.config.train.global_batch_size * cell.config.data.seq_length


def flops(cell: Cell) -> float:
    return flops_per_token(ParameterTable.of(cell.config), cell.config.data.seq_length)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(2_000, 200_000))
def test_tokens(budget: int, write_study: WriteStudy, tmp_path: Path) -> None:
    study = load_study(write_study(grid=[LENGTHS, DEPTHS], seeds=[1]), tmp_path, [f"budget.tokens={budget}"])
    for cell in study.cells:
        assert abs(tokens(cell) - budget) <= tokens_a_step(cell) / 2


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(20_000, 200_000), depth=st.sampled_from(["2", "5"]))
def test_compute_is_that_of_the_reference(budget: int, depth: str, write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(grid=[LENGTHS, DEPTHS], seeds=[1])
    overrides = [
        f"budget.tokens={budget}",
        "budget.match=compute",
        f'budget.reference={{length: "64", depth: "{depth}"}}',
    ]
    cells = load_study(path, tmp_path, overrides).cells
    reference = next(cell for cell in cells if dict(cell.labels) == {"length": "64", "depth": depth})
    for cell in cells:
        assert abs(tokens(cell) * flops(cell) - budget * flops(reference)) <= flops(cell) * tokens_a_step(cell) / 2 + 1


@pytest.mark.parametrize(
    ("settings", "mean_dead"),
    [
        ("sparse_weights: {density: 0.25}", 0.75),
        ("srste: {pattern: '1:4'}", 0.75),
        ("iss: {density: 0.5, freeze: 0.5}", 0.25),
        ("spdf: {density: 0.25, dense_after: 0.8}", 0.6),
        # Linearly from 0 at a quarter of the steps to 0.5 at three quarters: a quarter on average.
        ("journey: {density: 0.5, unit: steps, ramp: linear}", 0.25),
        ("efficient_llm: {density: 0.5, pattern: neuron, start: 0, end: 1}", 0.25),
    ],
)
def test_effective_compute_leaves_out_dead_weights(
    settings: str, mean_dead: float, write_study: WriteStudy, tmp_path: Path
) -> None:
    name = settings.partition(":")[0]
    cells = {"dense": {}, "sparse": {f"mechanisms.{name}": yaml.safe_load(settings)[name]}}
    path = write_study(grid=[{"name": "method", "cells": cells}], seeds=[1])
    budget = ["budget.match=effective_compute", "budget.tokens=2000000"]
    dense, sparse = load_study(path, tmp_path, budget).cells
    table = ParameterTable.of(dense.config)
    masked_kinds = ("mlp", "qkv", "attention") if name != "efficient_llm" else ("mlp",)
    masked = sum(
        row.total
        for layer in range(dense.config.model.num_layers)
        for row in table.layer(layer)
        if len(row.shape) == 2 and row.name.startswith(masked_kinds)
    )
    effective = flops(dense) - 6 * masked * mean_dead
    assert tokens(sparse) * effective == pytest.approx(2e6 * flops(dense), rel=0.01)


def test_sparse_ift_wide_costs_what_the_dense_model_costs(repo_root: Path) -> None:
    settled = ["data.prefix=x", "model.vocab_size=8192"]
    wide = load_config(repo_root / "examples/configs/nano_sparse_ift_wide.yaml", settled, mechanisms=MECHANISMS)
    dense = load_config(None, ["model.preset=nano-dense", "data.seq_length=256", *settled])
    expected = training_flops_per_token(dense)
    assert training_flops_per_token(wide, is_effective=True) == pytest.approx(expected, rel=0.01)
    assert training_flops_per_token(wide) > 1.5 * expected, "what dense hardware takes"


def test_without_tokens_the_reference_trains_the_base_steps(write_study: WriteStudy, tmp_path: Path) -> None:
    first, second = load_study(write_study(grid=[DEPTHS], seeds=[1]), tmp_path, ["budget.match=compute"]).cells
    assert first.config.train.train_steps == 10
    assert second.config.train.train_steps == round(10 * flops(first) / flops(second)) < 10


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_warm_up_is_a_share_of_the_steps(share: float, write_study: WriteStudy, tmp_path: Path) -> None:
    overrides = ["budget.tokens=6400", f"budget.warmup_share={share}", "run.schedule.lr_warmup_steps=500"]
    for cell in load_study(write_study(), tmp_path, overrides).cells:
        assert cell.config.train.train_steps == 100
        assert cell.config.schedule.lr_warmup_steps == int(100 * share)
