"""Planned memory against real tensors on every rank of a layout, by part, within 5 %."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.planning.layout import layout_of
from sparsecod_megatron.planning.memory import rank_memory
from tests.dist.layouts import Layout
from tests.dist.memory_worker import LAYOUTS, layout_config
from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, list[dict[str, int]]]:
    """{part: bytes} by layout and rank, and the rank's pipeline `stage`."""
    file = tmp_path_factory.mktemp("memory") / "measured.json"
    script_ranks(repo_root / "tests/dist/memory_worker.py", file, nproc=4)
    content: dict[str, list[dict[str, int]]] = json.loads(file.read_text())
    return content


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_rank(layout: Layout, measured: dict[str, list[dict[str, int]]]) -> None:
    planned = layout_of(layout_config(layout), layout.nproc, transformer_engine=False)
    ranks = measured[layout.name]
    assert len(ranks) == layout.nproc
    for rank in ranks:
        memory = rank_memory(planned, rank.pop("stage"))
        ours = {**memory.parts(), "activations": memory.activations + memory.logits}
        for part, size in rank.items():
            assert ours[part] == pytest.approx(size, rel=0.05), part
