"""The shipped study of schedules compares ways to one mean number of weights; its densities have to give that mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.mechanism import configured
from sparsecod_megatron.seams.plugin import StepContext
from sparsecod_megatron.studies import load_study

SHIPPED = Path(__file__).resolve().parents[3] / "examples/studies/nano/journey_law.yaml"
MEANS = {"always": 0.625, "early": 0.625, "middle": 0.625, "late": 0.625, "middle_75": 0.75, "middle_50": 0.5}


@pytest.mark.parametrize(("way", "expected"), MEANS.items())
def test_ways_have_the_mean_that_the_study_says(way: str, expected: float, tmp_path: Path) -> None:
    study = load_study(SHIPPED, tmp_path, ["run.data.prefix=data/books", "run.model.vocab_size=2048"])
    config = study.cell(f"way={way},seed=1").config
    (method,) = configured(config)
    assert isinstance(method, WeightMechanism)
    table, steps = ParameterTable.of(config), config.train.train_steps
    live = [sum(method.live_counts(table, StepContext(step, steps))) for step in range(1, steps + 1)]
    size = sum(matrix.size for matrix in method.matrices(table))
    assert sum(live) / len(live) / size == pytest.approx(expected, abs=2e-3)
