"""Questions that mean nothing, for models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from sparsecod_megatron.analysis.tasks.items import Answered, Items, items_of


def random_items(vocab_size: int, *, count: int = 5, seed: int = 7) -> Items:
    """Random prompts of 3 to 7 tokens with answers of 1 to 3, of two difficulties."""
    generator = torch.Generator().manual_seed(seed)

    def upto(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    answered = []
    for number in range(count):
        prompt, answer = upto(3, 7), upto(1, 3)
        ids = torch.randint(3, vocab_size, (prompt + answer,), generator=generator).tolist()
        answered.append(Answered(ids, prompt, number % 2 + 1))
    return items_of("random", answered, vocab_size=vocab_size)


def write_questions(path: Path, vocab_size: int, count: int) -> Path:
    """Random prompts of two to five words with answers of one or two, of two difficulties, the same each time."""
    generator = np.random.default_rng(1)
    lines = []
    for number in range(count):
        sizes = generator.integers(2, 6), generator.integers(1, 3)
        prompt, answer = (
            " ".join(f"w{word}" for word in generator.integers(0, vocab_size - 1, size=size)) for size in sizes
        )
        lines.append(json.dumps({"prompt": prompt, "answer": f" {answer}", "difficulty": number % 2 + 1}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
