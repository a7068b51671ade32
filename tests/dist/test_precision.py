"""bf16 with fp32 master weights is near fp32; test_buckets.py resumes it bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Bench
from tests.dist.layouts import SP, TP2
from tests.dist.test_layouts import series, statistics

pytestmark = pytest.mark.dist


def test_bf16(bench: Bench, initial: dict[str, Path], reference: dict[str, Path]) -> None:
    """Losses within 1 % of fp32's, early statistics within 2 %."""
    overrides = (f"checkpoint.init_from={initial['dense']}", "precision.dtype=bf16", TP2, SP)
    whole = bench.train("bf16", *overrides, nproc=2)
    np.testing.assert_allclose(series(whole, "loss"), series(reference["dense"], "loss"), rtol=1e-2)
    expected = statistics(reference["dense"])
    for name in ("out_var", "attn_var", "mlp_var", "cos", "out_kurt", "param_norm", "grad_norm"):
        np.testing.assert_allclose(statistics(whole)[name][0], expected[name][0], rtol=2e-2, err_msg=name)
