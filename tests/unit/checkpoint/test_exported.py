"""Every export computes what its checkpoint does, unless it is asked for without the comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecod_megatron.errors import ConversionError
from tests.unit.checkpoint.test_stream import write

from sparsecod_megatron.checkpoint.exported import export_checkpoint  # isort: skip  (after a backend is selected)

PAIRS = "megatron={rotary_interleaved: true}"


def test_the_comparison_lies_beside_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "run", "model.hidden_dropout=0.3", "model.attention_dropout=0.3")  # for training only
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    for part in json.loads((tmp_path / "hf" / "parity.json").read_text()).values():
        assert part["passed"] is True
        assert 0 <= part["max_difference"] <= part["tolerance"] < 1e-3


@pytest.mark.parametrize(
    ("verify", "message"),
    [
        (True, "layer 0: attention between its projections: rotary embedding"),
        (False, r"megatron\.rotary_interleaved: .*remove --no-verify"),
    ],
)
def test_a_model_that_the_classes_cannot_say_is_not_written(verify: bool, message: str, tmp_path: Path) -> None:
    """Rotation of neighbouring channels, which only `megatron:` can ask for, is not Llama's."""
    write(tmp_path / "run", PAIRS)
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


MEASURE = """
import json, resource, sys
from sparsecod_megatron.cli.main import main

def peak_after(arguments):
    assert main(arguments) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = json.loads(sys.argv[1])
print(-peak_after(small) + peak_after(large))
"""


@pytest.mark.slow
def test_export_and_import_hold_less_than_two_models(tmp_path: Path) -> None:
    """All resident pages, those of mapped files included, beyond what the same command takes for a tiny model."""
    shape = ("model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_layers=8", "model.vocab_size=4096")
    models = {"small": (), "large": shape}
    for name, overrides in models.items():
        write(tmp_path / name, *overrides)
    commands = {
        "export": [
            ["export", "--checkpoint", str(tmp_path / name), "--output", str(tmp_path / f"{name}-hf")]
            for name in models
        ],
        "import": [
            ["import", "--hf", str(tmp_path / f"{name}-hf"), "--output", str(tmp_path / f"{name}-run")]
            for name in models
        ],
    }
    for name, both in commands.items():
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, json.dumps(both)], capture_output=True, text=True, timeout=600, check=True
        )
        size = (tmp_path / "large-hf" / "model.safetensors").stat().st_size
        assert size > 100e6
        assert int(measured.stdout.splitlines()[-1]) < 2 * size, name
