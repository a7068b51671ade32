"""Which GPU takes which FP8 recipe, without one."""

from __future__ import annotations

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.backend.precision_support import check_precision
from sparsecod_megatron.config import PrecisionConfig
from sparsecod_megatron.errors import ConfigError

AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("recipe", "capabilities"),
    [
        ("none", [None, AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION]),
        ("delayed", [ADA, HOPPER, BLACKWELL, WORKSTATION]),
        ("tensorwise", [ADA, HOPPER, BLACKWELL, WORKSTATION]),
        ("blockwise", [HOPPER, BLACKWELL, WORKSTATION]),
        ("mxfp8", [BLACKWELL, (10, 3)]),
    ],
)
def test_accepted(recipe: str, capabilities: list[tuple[int, int] | None]) -> None:
    for capability in capabilities:
        check_precision(PrecisionConfig(fp8_recipe=recipe), capability=capability, cuda_version=(12, 9))


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda_version", "parts"),
    [
        ("blockwise", None, None, ["needs a CUDA GPU with FP8 (Hopper or newer)", "fp8_recipe=none"]),
        ("delayed", AMPERE, (12, 9), ["8.9, this one has 8.0", "fp8_recipe=none"]),
        ("mxfp8", AMPERE, (12, 9), ["8.9, this one has 8.0", "fp8_recipe=none"]),
        ("mxfp8", ADA, (12, 9), ["Blackwell", "this one has 8.9", "fp8_recipe=tensorwise"]),
        ("mxfp8", HOPPER, (13, 0), ["Blackwell", "this one has 9.0", "fp8_recipe=blockwise"]),
        ("mxfp8", WORKSTATION, (13, 0), ["10.x, this one has 12.0", "fp8_recipe=blockwise"]),
        ("blockwise", ADA, (12, 9), ["9.0, this one has 8.9", "fp8_recipe=tensorwise"]),
        ("blockwise", HOPPER, (12, 8), ["CUDA 12.9, this one has 12.8", "fp8_recipe=tensorwise"]),
    ],
)
def test_refused(
    recipe: str, capability: tuple[int, int] | None, cuda_version: tuple[int, int] | None, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_precision(PrecisionConfig(fp8_recipe=recipe), capability=capability, cuda_version=cuda_version)
    text = str(caught.value)
    assert text.startswith(f"precision.fp8_recipe: '{recipe}'") and "\n" not in text
    for part in parts:
        assert part in text


def test_backend_of_a_run_is_refused_before_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="computes on the CPU"):
        select_backend(precision=PrecisionConfig(fp8_recipe="tensorwise"))
