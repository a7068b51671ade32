"""Every export computes what its checkpoint does, unless it is asked for without the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.errors import ConversionError
from tests.unit.checkpoint.test_stream import write

from sparsecod_megatron.checkpoint.exported import export_checkpoint  # isort: skip  (after a backend is selected)

NOPE = "megatron={no_rope_freq: [0, 1, 1]}"


def test_the_comparison_lies_beside_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "run", "model.hidden_dropout=0.3", "model.attention_dropout=0.3")  # for training only
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    for part in json.loads((tmp_path / "hf" / "parity.json").read_text()).values():
        assert part["passed"] is True
        assert 0 <= part["max_difference"] <= part["tolerance"] < 1e-3


@pytest.mark.parametrize(
    ("verify", "message"),
    [
        (True, "layer 1: attention between its projections: rotary embedding"),
        (False, r"megatron\.no_rope_freq: .*leave --no-verify out"),
    ],
)
def test_a_model_that_the_classes_cannot_say_is_not_written(verify: bool, message: str, tmp_path: Path) -> None:
    """Layers without positions, which only `megatron:` can ask for, are no Llama."""
    write(tmp_path / "run", NOPE)
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
