"""GPU tests need Transformer Engine beside the device."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def transformer_engine(request: pytest.FixtureRequest) -> None:
    """Skip `gpu` tests by name where Transformer Engine is not installed."""
    if request.node.get_closest_marker("gpu"):
        pytest.importorskip("transformer_engine")
