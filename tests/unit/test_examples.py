"""Every YAML in examples/ is a run that Megatron-Core builds, on the processes and of the size that its header says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import RunConfig, data_parallel_size, load_config, preset_names
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.meta import meta_model, parameter_counts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
QUICKSTART_VOCABULARY, NANO_VOCABULARY = 4096, 8192
_NUMBER = r"([\d.]+)([BM])"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds(path: Path) -> None:
    """Parses, fits its processes, becomes a TransformerConfig of its layout, and a model without memory."""
    backend = select_backend()
    from sparsecod_megatron.model import transformer_config

    config, header = load(path), path.read_text()
    processes = re.search(r"--nproc (\d+)|(\d+) GPUs", header)
    assert processes, "the header says on how many processes it runs"
    assert data_parallel_size(config, int(processes.group(1) or processes.group(2))) >= 1
    assert f"examples/configs/{path.name} " in header, "the header's command names its own file"
    assert config.logging.run_dir == f"runs/{path.stem}"
    megatron = transformer_config(config, transformer_engine=backend.transformer_engine)
    assert megatron.num_layers == config.model.num_layers
    with meta_model(config) as model:
        total, active = parameter_counts(model, config)
    for pattern, count in ((f"{_NUMBER} parameters", total), (f"{_NUMBER} active", active)):
        for digits, unit in re.findall(pattern, header.splitlines()[0]):
            assert f"{count / {'B': 1e9, 'M': 1e6}[unit]:.{decimals(digits)}f}" == digits


def load(path: Path) -> RunConfig:
    config = load_config(path, mechanisms=MECHANISMS)
    if config.model.vocab_size is None:
        config.model.vocab_size = QUICKSTART_VOCABULARY if path.stem.startswith("quickstart") else NANO_VOCABULARY
    return config


def decimals(digits: str) -> int:
    return len(digits.partition(".")[2])


def test_every_preset_has_an_example() -> None:
    assert {load_config(path, mechanisms=MECHANISMS).model.preset for path in CONFIGS} - {None} == set(preset_names())
