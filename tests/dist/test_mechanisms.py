"""Every mechanism under every layout: losses, gradient norms and statistics of one process, and checkpoints between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.dist.mechanisms_worker import LAYOUT_CASES, RESUMED, LayoutCase, train
from tests.helpers.cli import script_ranks
from tests.helpers.mechanisms import CASES, TOGETHER

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For checkpoints."""
    return tmp_path_factory.mktemp("mechanisms")


@pytest.fixture(scope="module")
def spread(folder: Path, repo_root: Path) -> dict[str, Any]:
    """All cases on two processes."""
    output = folder / "runs.json"
    script_ranks(repo_root / "tests/dist/mechanisms_worker.py", output, folder, nproc=2)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def single(spread: dict[str, Any], folder: Path) -> dict[tuple[str, str], Any]:
    """Each group in this process; of the dense model the last step from two processes' checkpoint too."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    runs = {}
    for model, group in dict.fromkeys((case.model, case.subject) for case in LAYOUT_CASES):
        config = LayoutCase(model, group).config()
        with running_processes(config, communication=backend.communication, device=backend.device) as groups:
            runs[model, group] = train(config, backend, groups)
            resumed = train(config, backend, groups, resume=folder / f"{model}-{group}")
            runs[model, f"{group}-resumed"] = resumed
    return runs


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], steps: slice = slice(None)) -> None:
    """To 1e-5; statistics of weights and activations too."""
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name][steps], rtol=1e-5, err_msg=name)
    for layers, expected in zip(ours["layers"], theirs["layers"][steps], strict=True):
        for layer, want in zip(layers, expected, strict=True):
            # A resumed run has no earlier mask to compare its first with.
            assert set(layer) == set(want) - ({"mask_flips"} if steps != slice(None) else set())
            for name, value in ((name, want[name]) for name in layer):
                # An update of the size of rounding noise is a share of the noise.
                rtol = 1e-3 if name == "update_ratio" else 2e-5
                # Rows of a mean of permutations are off by rounding alone.
                atol = 1e-6 if name == "mix_row_error" else 0
                np.testing.assert_allclose(layer[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda case: case.name)
def test_equals_one_process(case: LayoutCase, spread: dict[str, Any], single: dict[tuple[str, str], Any]) -> None:
    theirs = single[case.model, case.subject]
    assert_same(spread[case.name], theirs)
    values = [np.ravel(value) for layers in theirs["layers"] for layer in layers for value in layer.values()]
    assert values and np.isfinite(np.concatenate(values)).all()


@pytest.mark.parametrize(("model", "group"), dict.fromkeys((case.model, case.subject) for case in LAYOUT_CASES))
def test_a_checkpoint_continues_under_other_layouts(
    model: str, group: str, spread: dict[str, Any], single: dict[tuple[str, str], Any]
) -> None:
    """Saved by two processes after two steps; the third in another layout of two, and in one process."""
    theirs = single[model, group]
    for layout in (layout for layout in RESUMED[model] if LayoutCase(model, group, layout) in LAYOUT_CASES):
        assert_same(spread[f"{model}-{group}-{layout}-resumed"], theirs, slice(2, 3))
    assert_same(single[model, f"{group}-resumed"], theirs, slice(2, 3))


def test_every_mechanism_is_tested() -> None:
    assert set(MECHANISMS.names) == set(CASES) == {name for names in TOGETHER.values() for name in names}
