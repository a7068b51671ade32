"""Every layout gives the losses, gradient norms and layer statistics of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import MODELS, STEPS, Bench
from tests.dist.layouts import LAYOUTS, Layout
from tests.helpers.cli import read_jsonl

pytestmark = pytest.mark.dist


def series(run: Path, field: str) -> np.ndarray:
    """One field of metrics.jsonl, [steps]."""
    return np.array([record[field] for record in read_jsonl(run / "metrics.jsonl")])


def statistics(run: Path) -> dict[str, np.ndarray]:
    """Layer statistics by name, each [steps, layers] or [steps, layers, experts]."""
    records = read_jsonl(run / "layer_statistics.jsonl")
    names = [name for name in records[0]["layers"][0] if name != "layer"]
    return {name: np.array([[layer[name] for layer in record["layers"]] for record in records]) for name in names}


def assert_statistics_equal(run: Path, single: Path, *, rtol: float) -> None:
    """All statistics of all steps, relative to `rtol`.

    Some are not continuous in their input. Elements on the border of three standard deviations may count or not, and
    so may those on the border of small activations, and units with few of them.
    Rounding may decide a token between two experts: steps are compared until the routing first differs. Skewness and
    cosine have a sign, so near zero they are compared on the scale of their largest value. Third and fourth moments
    magnify the rounding by which the weights differ after the first update: from then on, 20 times the tolerance.
    """
    ours, theirs = statistics(run), statistics(single)
    assert ours.keys() == theirs.keys()
    steps = len(theirs["out_var"])
    if "tokens_per_expert" in theirs:
        differs = (ours["tokens_per_expert"] != theirs["tokens_per_expert"]).any(axis=(1, 2))
        # The auxiliary loss picks its experts once more, by rounded probabilities, of which two may be equal.
        differs |= ~np.isclose(ours["aux_loss"], theirs["aux_loss"], rtol=1e-5, atol=0).all(axis=1)
        steps = int(np.argmax(differs)) if differs.any() else steps
        assert steps >= 5
    elements = 8 * 32 * 64
    for name, values in theirs.items():
        atol = 2 / elements if name.endswith("outlier_frac") else 0.0
        if name in ("act_small", "dead_units", "always_on_units"):
            atol = 4 / elements if name == "act_small" else 1.0
        if name == "cos" or name.endswith("_skew"):
            atol = rtol * np.abs(values).max()
        np.testing.assert_allclose(ours[name][:1], values[:1], rtol=rtol, atol=atol, err_msg=name)
        later = 20 if "skew" in name or "kurt" in name else 1
        rest = slice(1, steps)
        np.testing.assert_allclose(ours[name][rest], values[rest], rtol=later * rtol, atol=later * atol, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(
    layout: Layout, bench: Bench, initial: dict[str, Path], reference: dict[str, Path]
) -> None:
    """Eight fp32 steps: losses to 1e-4 and layer statistics to 1e-5, relative; the same tokens counted."""
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
    assert_statistics_equal(run, single, rtol=1e-5)


def test_every_group_is_there(reference: dict[str, Path]) -> None:
    dense, moe = (statistics(reference[model]) for model in ("dense", "moe"))
    names = ("out_var", "mlp_ratio", "cos", "out_kurt", "massive", "grad_norm", "update_ratio")
    for name in (*names, "act_nonzero", "act_small", "first_token_mass"):
        assert dense[name].shape == moe[name].shape == (STEPS, 4)
        assert np.isfinite(dense[name]).all() and (dense[name] != 0).all()
    assert moe["tokens_per_expert"].shape == (STEPS, 4, 4) and "tokens_per_expert" not in dense
    # Every token of the global batch once: 8 sequences of 32 tokens, two experts each.
    np.testing.assert_allclose(moe["tokens_per_expert"].sum(axis=2), 8 * 32 * 2)


def test_losses_fall(reference: dict[str, Path]) -> None:
    """The comparison is of runs that learn, not of constants."""
    for run in reference.values():
        loss = series(run, "loss")
        assert loss[-1] < loss[0] - 0.5
