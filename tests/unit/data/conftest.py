"""Small texts, and the reading of what `sparsecod data` wrote by means other than its own code."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WORDS = ["the", "depth", "of", "residual", "streams", "grows", "with", "each", "layer", "naïve", "größe", "日本", "🎉"]


def make_text(seed: int, words: int) -> str:
    """Words and line ends, the same for the same seed."""
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + generator.choice("    \n") for _ in range(words))


@pytest.fixture
def text_directory(tmp_path: Path) -> Path:
    """Twelve text files of different lengths."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for number in range(12):
        (directory / f"{number:02}.txt").write_text(make_text(number, 60 + 20 * number), encoding="utf-8")
    return directory


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., str]:
    """Writes token files of given documents with Megatron's own builder; returns their prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(documents: list[list[int]], name: str = "tokens", dtype: type[np.integer] = np.uint16) -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write
