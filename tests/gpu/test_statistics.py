"""Layer statistics on CUDA are those of the CPU, whichever kernels compute them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsecod_megatron.metrics.moments import token_cosines, token_shapes
from tests.gpu.runs import Statistics, fresh_model, load_plain_weights, needs_engine, statistics_of


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights, tokens and statistics of a process that sees no GPU."""
    path = tmp_path_factory.mktemp("cpu") / "statistics.pt"
    worker = Path(__file__).with_name("cpu_statistics.py")
    subprocess.run([sys.executable, str(worker), str(path)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    return torch.load(path)


def assert_close(got: Statistics, expected: Statistics, *, rtol: float, atol: float) -> None:
    assert [sorted(layer) for layer in got] == [sorted(layer) for layer in expected]
    for index, layer in enumerate(expected):
        for name, value in layer.items():
            np.testing.assert_allclose(got[index][name], value, rtol=rtol, atol=atol, err_msg=f"{name} of {index}")


def statistics_here(cpu: dict[str, Any], *, transformer_engine: bool) -> Statistics:
    with fresh_model(transformer_engine=transformer_engine) as model:
        load_plain_weights(model, cpu["weights"])
        device = next(model.parameters()).device
        return statistics_of(model, cpu["tokens"].to(device))


def test_another_process_repeats_them(cpu: dict[str, Any]) -> None:
    """On a machine without a GPU the comparison is of the CPU with itself, and exact."""
    if torch.cuda.is_available():
        pytest.skip("the tests below compare this process")
    assert_close(statistics_here(cpu, transformer_engine=False), cpu["layers"], rtol=0, atol=0)


@pytest.mark.gpu
def test_reference_layers_equal_the_cpu(cpu: dict[str, Any]) -> None:
    assert_close(statistics_here(cpu, transformer_engine=False), cpu["layers"], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_engine
def test_transformer_engine_layers_equal_the_cpu(cpu: dict[str, Any]) -> None:
    """Transformer Engine multiplies fp32 matrices in TF32, with ten bits of mantissa."""
    assert_close(statistics_here(cpu, transformer_engine=True), cpu["layers"], rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_moments_equal_eager_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(300, 512, generator=generator)
    after = before + torch.randn(300, 512, generator=generator).pow(3)
    after[7] = 3.0  # a token without shape
    for function, tensors in ((token_shapes, (after,)), (token_cosines, (before, after))):
        moved = [tensor.to("cuda", dtype) for tensor in tensors]
        compiled = torch.compile(function, fullgraph=True)(*moved).cpu()
        eager = function(*(tensor.cpu() for tensor in moved))
        np.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=2e-3)
