"""Model directories: what transformers would load with random weights, or not at all, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.models.loading import load_model, load_tokenizer
from tests.helpers.words import save_with_words
from tests.unit.compression.models import tiny


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_with_words(tiny("llama"), tmp_path / "model")


def test_round_trip(model_dir: Path) -> None:
    loaded = load_model(model_dir, dtype="float32", device="cpu")
    assert not loaded.training
    for name, weight in tiny("llama").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert load_model(model_dir, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_tokenizer(model_dir)("w1")["input_ids"] == [2]


def test_missing_tensor_is_not_made_up(model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, the first model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(model_dir, dtype="float32", device="cpu")


def test_truncated_weights(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load this model"):
        load_model(model_dir, dtype="float32", device="cpu")


def test_weights_of_another_shape(model_dir: Path) -> None:
    config = (model_dir / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 64')
    (model_dir / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="cannot load this model"):
        load_model(model_dir, dtype="float32", device="cpu")


def test_no_model_and_no_tokenizer(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "absent", dtype="float32", device="cpu")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_tokenizer(tmp_path)
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(model_dir)
