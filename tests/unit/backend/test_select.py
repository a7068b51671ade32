"""What has to be settled before anything asks for a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from sparsecod_megatron.backend import select_backend


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("32", "32")])
def test_launch_order_is_set_before_cuda_is_looked_at(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads the variable when it starts, which asking for the number of devices does already."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []
    original = torch.cuda.is_available

    def looked() -> bool:
        seen.append(os.environ.get(name))
        return original()

    monkeypatch.setattr(torch.cuda, "is_available", looked)
    select_backend()
    assert seen and set(seen) == {expected}
