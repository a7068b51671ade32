"""What all cells have in common is equal to within half a step of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.studies import Cell, load_study
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
