"""An export of a model that keeps the largest activations passes the gate although rounding breaks ties differently."""

from __future__ import annotations

import json
from pathlib import Path

from sparsecod_megatron.backend import select_backend
from tests.helpers.training import small_trainer

select_backend()

# Half of 4,096 units: in 128 tokens some layer has two about the middle that tie.
SETTINGS = (
    "mechanisms.topk_activation.k=2048",
    "model.ffn_hidden_size=4096",
    "model.init_method_std=0.2",
    "data.seq_length=128",
)


def test_values_that_tie_are_no_difference(tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    with small_trainer(*SETTINGS) as trainer:
        saved = save_checkpoint(tmp_path / "run", trainer, state=TrainState(step=1))
    export_checkpoint(saved, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/parity.json").read_text())["random"]["passed"]
