"""`sparsecod import`: weights alone, shown to give the logits that transformers gives, or nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.cli import import_
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families import FAMILIES
from sparsecod_megatron.hf.families.entries import LayerTensors
from sparsecod_megatron.hf.source import open_source
from sparsecod_megatron.hf.table import Entry
from tests.unit.hf.test_source import CONFIGS, save

BACKEND = select_backend()

from sparsecod_megatron.checkpoint.native import load_checkpoint  # noqa: E402
from sparsecod_megatron.checkpoint.stream import streamed_checkpoint  # noqa: E402
from sparsecod_megatron.model import unwrap  # noqa: E402
from sparsecod_megatron.parallel import running_processes  # noqa: E402
from sparsecod_megatron.train.setup import build_trainer  # noqa: E402


def imported(folder: Path) -> Path:
    import_.run(argparse.Namespace(hf=folder, output=folder.parent / "run", config=None, verify=True))
    return folder.parent / "run"


def test_a_run_starts_from_the_weights_that_were_shown_to_be_right(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path / "hf")
    run = imported(folder)
    assert all(part["passed"] for part in json.loads((run / "parity.json").read_text()).values())
    config = load_config(run / "config.yaml", ["precision.dtype=fp32", "train.global_batch_size=1"])
    with streamed_checkpoint(run) as source:
        step_dir, saved = source.step_dir, {name: tensor.clone() for name, tensor in source.tensors.items()}
    # An optimizer's fp32 weights and moments would be three times as much again.
    weights = sum(tensor.nbytes for tensor in saved.values())
    assert sum(path.stat().st_size for path in step_dir.glob("*.distcp")) < 1.5 * weights + 2**17
    with running_processes(config, communication=BACKEND.communication, device=BACKEND.device) as groups:
        trainer = build_trainer(config, BACKEND, groups)
        assert load_checkpoint(step_dir, trainer).step == 0
        loaded = dict(unwrap(trainer.models[0]).named_parameters())
        for name, tensor in open_source(folder).tensors():
            assert torch.equal(loaded[name], tensor), name


def test_what_is_read_otherwise_than_by_transformers_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that takes gate for up in both directions, so that it agrees with itself."""
    llama = FAMILIES[0]

    def entries(tensors: LayerTensors) -> Iterator[Entry]:
        fc1, fc2 = llama.mlp_entries(tensors)
        yield dataclasses.replace(fc1, hf=fc1.hf[::-1])
        yield fc2

    wrong = dataclasses.replace(llama, mlp_entries=entries)
    monkeypatch.setattr("sparsecod_megatron.hf.families.choose.FAMILIES", (wrong, *FAMILIES[1:]))
    folder = save(CONFIGS["llama"], tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"first tensor that differs: layer 0: model\.layers\.0\.mlp\.gate_proj"):
        imported(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
