"""Exports of models that choose among activations or keys pass the gate although rounding breaks ties differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.backend import select_backend
from tests.helpers.training import small_trainer

select_backend()

SETTINGS = {
    # Half of 4,096 units: in 128 tokens some layer has two about the middle that tie.
    "topk_activation": ("mechanisms.topk_activation.k=2048", "model.ffn_hidden_size=4096"),
    # 16,384 logits of each token and layer: in 128 tokens some lie where rounding decides whether they count.
    "monet": (
        "mechanisms.monet={experts: 512, heads: 16, k: 128}",
        "model.activation=relu2",
        "model.ffn_hidden_size=1024",
        "train.seed=1",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_that_tie_are_no_difference(name: str, tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    with small_trainer(*SETTINGS[name], "model.init_method_std=0.2", "data.seq_length=128") as trainer:
        saved = save_checkpoint(tmp_path / "run", trainer, state=TrainState(step=1))
    export_checkpoint(saved, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/parity.json").read_text())["random"]["passed"]
