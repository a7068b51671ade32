"""CUDA without Transformer Engine trains what it trains with it, and from the same checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.gpu.runs import needs_engine, train

STEPS = 10
EXPERTS = ("model.num_moe_experts=4", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=256")
WITHOUT = """
import json, sys
sys.modules["transformer_engine"] = None
from tests.gpu.runs import train
print("losses", json.dumps(train(*json.loads(sys.argv[1]), steps=int(sys.argv[2])).losses))
"""


@pytest.mark.gpu
@needs_engine
@pytest.mark.parametrize("model", [(), EXPERTS, ("optimizer.optimizer=muon",)])
def test_losses_are_alike(model: tuple[str, ...]) -> None:
    overrides = (*model, "precision.dtype=bf16")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, json.dumps(overrides), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training without Transformer Engine" in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("losses "))
    expected = train(*overrides, steps=STEPS).losses
    assert json.loads(line.removeprefix("losses ")) == pytest.approx(expected, rel=0.02)
