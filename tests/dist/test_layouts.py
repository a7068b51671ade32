"""Every layout gives the losses, gradient norms and layer statistics of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import MODELS, Bench
from tests.dist.layouts import LAYOUTS, Layout
from tests.helpers.cli import read_jsonl

pytestmark = pytest.mark.dist


def series(run: Path, field: str) -> np.ndarray:
    """One field of metrics.jsonl, [steps]."""
    return np.array([record[field] for record in read_jsonl(run / "metrics.jsonl")])


def statistics(run: Path) -> tuple[np.ndarray, list[str]]:
    """All layer statistics, [steps, layers, names], and the names."""
    records = read_jsonl(run / "layer_statistics.jsonl")
    names = [name for name in records[0]["layers"][0] if name != "layer"]
    return np.array([[[layer[name] for name in names] for layer in record["layers"]] for record in records]), names


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(
    layout: Layout, bench: Bench, initial: dict[str, Path], reference: dict[str, Path]
) -> None:
    """20 fp32 steps: losses to 1e-4, the first step's statistics to 1e-5, all relative; the same tokens counted."""
    run = bench.train(
        layout.name,
        f"checkpoint.init_from={initial[layout.model]}",
        *MODELS[layout.model],
        *layout.overrides,
        nproc=layout.nproc,
    )
    single = reference[layout.model]
    np.testing.assert_allclose(series(run, "loss"), series(single, "loss"), rtol=1e-4)
    np.testing.assert_allclose(series(run, "grad_norm"), series(single, "grad_norm"), rtol=1e-3)
    np.testing.assert_array_equal(series(run, "tokens"), series(single, "tokens"))
    ours, names = statistics(run)
    theirs, expected_names = statistics(single)
    assert names == expected_names and ours.shape == theirs.shape == (20, 4, 8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=str(names))


def test_losses_fall(reference: dict[str, Path]) -> None:
    """The comparison is of runs that learn, not of constants."""
    for run in reference.values():
        loss = series(run, "loss")
        assert loss[-1] < loss[0] - 0.5
