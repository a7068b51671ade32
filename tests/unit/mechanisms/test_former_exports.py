"""Directories that earlier versions exported, whose keys have become mechanisms, compute and import as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.mechanisms import CASES
from tests.helpers.training import small_trainer


@pytest.mark.parametrize(("key", "value"), MECHANISMS.former_keys)
def test_a_former_export_is_the_mechanisms(key: str, value: str, tmp_path: Path) -> None:
    """The same weights under the key of that time: the same logits, and the same run and tensors once imported."""
    backend = select_backend()
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
    from sparsecod_megatron.checkpoint.whole import write_weights
    from sparsecod_megatron.cli.import_ import run_config
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.models.loading import load_model

    name, folder = MECHANISMS.former_keys[key, value], tmp_path / "hf"
    with small_trainer(*CASES[name].settings, "model.init_method_std=0.1") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState())
        expected_run = trainer.config
    export_checkpoint(saved, folder, verify=False)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_model(folder, dtype="float32", device="cpu")(tokens).logits
        fields = json.loads((folder / "config.json").read_text())
        assert fields.pop("mechanisms") == {name: {}} and fields[key] != value
        (folder / "config.json").write_text(json.dumps(fields | {key: value}))
        assert torch.equal(load_model(folder, dtype="float32", device="cpu")(tokens).logits, expected)
    source = open_source(folder)
    config = run_config(source, None)
    assert config.mechanisms == expected_run.mechanisms
    assert getattr(config.model, key) == getattr(expected_run.model, key)
    imported = write_weights(source.tensors([*config.mechanisms.values()]), config, tmp_path / "imported", backend)
    with streamed_checkpoint(saved) as ours, streamed_checkpoint(imported) as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[each], theirs.tensors[each]) for each in ours.tensors)
