"""bf16 with fp32 master weights: near fp32, and resumed bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Bench
from tests.dist.layouts import SP, TP2
from tests.dist.test_layouts import series, statistics

pytestmark = pytest.mark.dist


def test_bf16(bench: Bench, initial: dict[str, Path], reference: dict[str, Path]) -> None:
    """Losses within 1 % of fp32's, early statistics within 2 %; the second half again from its checkpoint, equal."""
    overrides = (f"checkpoint.init_from={initial['dense']}", "precision.dtype=bf16", TP2, SP)
    whole = bench.train("bf16", *overrides, nproc=2)
    np.testing.assert_allclose(series(whole, "loss"), series(reference["dense"], "loss"), rtol=1e-2)
    expected = statistics(reference["dense"])
    for name in ("out_var", "attn_var", "mlp_var", "cos", "out_kurt", "param_norm", "grad_norm"):
        np.testing.assert_allclose(statistics(whole)[name][0], expected[name][0], rtol=2e-2, err_msg=name)
    resumed = bench.directory / "bf16-resumed"
    shutil.copytree(whole, resumed)
    (resumed / "checkpoints" / "latest").write_text("step_00000006\n")
    bench.train(resumed.name, *overrides, nproc=2)
    np.testing.assert_array_equal(series(resumed, "loss"), series(whole, "loss"))
