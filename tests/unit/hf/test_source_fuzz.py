"""HuggingFace directories with any damage: a model whose tensors are read, or one ConversionError line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.source import open_source
from tests.helpers.json_damage import VALUES, places, replaced
from tests.unit.hf.test_source import CONFIGS, save


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts in several files, whose index is read too."""
    return save(CONFIGS["qwen2-moe"], tmp_path_factory.mktemp("fuzz") / "good", max_shard_size="60KB")


def read_or_refuse(folder: Path) -> None:
    """All of it, as `sparsecod import` does."""
    try:
        dict(open_source(folder).tensors())
    except ConversionError as error:
        assert str(error) and "\n" not in str(error)


def damaged_copy(sharded: Path, name: str, content: bytes) -> Path:
    """Beside the good one, with one file of its own."""
    folder = sharded.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@settings(max_examples=60)
@given(pick=st.integers(0, 10**6), value=VALUES)
@example(pick=0, value=[])
@example(pick=5, value="\n")  # a shard's name, which the message says
def test_any_value_in_a_json_file(sharded: Path, name: str, pick: int, value: Any) -> None:
    """Of the wrong type, sign or size."""
    content = json.loads((sharded / name).read_text())
    candidates = places(content)
    changed = replaced(content, candidates[pick % len(candidates)], value)
    read_or_refuse(damaged_copy(sharded, name, json.dumps(changed).encode()))


@settings(max_examples=60)
@given(position=st.integers(0, 3000), damage=st.binary(max_size=5), cut=st.sampled_from([0, 1, 4, 10**6]))
def test_any_bytes_in_a_weight_file(sharded: Path, position: int, damage: bytes, cut: int) -> None:
    """Its header for the most part, where offsets, types and shapes stand."""
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    position = min(position, len(content))
    read_or_refuse(damaged_copy(sharded, first.name, content[:position] + damage + content[position + cut :]))
