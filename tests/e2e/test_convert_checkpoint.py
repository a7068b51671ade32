"""`tools/convert_checkpoint.py`: another layout, and HuggingFace both ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsecod_megatron.config import load_config
from tests.helpers.cli import script

pytestmark = pytest.mark.e2e
TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def test_from_huggingface_through_another_layout_and_back(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "hf")
    steps = (
        ("--loader", "hf", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "run"),
        ("--load-dir", tmp_path / "run", "--save-dir", tmp_path / "spread", "--target-tensor-parallel-size", "2")
        + ("--target-pipeline-parallel-size", "2"),
        ("--saver", "hf", "--load-dir", tmp_path / "spread", "--save-dir", tmp_path / "back"),
    )
    for arguments in steps:
        result = script(TOOL, *arguments)
        assert result.returncode == 0, result.stderr
    parallel = load_config(tmp_path / "spread" / "config.yaml").parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 2)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    impossible = script(
        TOOL, *("--load-dir", tmp_path / "run", "--save-dir", tmp_path / "no", "--target-tensor-parallel-size", "3")
    )
    assert (impossible.returncode, impossible.stderr.count("\n")) == (2, 1), impossible.stderr
    assert not (tmp_path / "no").exists()
    again = ("--load-dir", tmp_path / "run", "--save-dir", tmp_path / "spread")
    occupied = subprocess.run([sys.executable, TOOL, *again], capture_output=True, text=True)
    assert (occupied.returncode, "is not empty" in occupied.stderr) == (2, True)
