"""Questions made here, whose difficulty is known by construction while everything else about them stays alike.

Source: both kinds after R. Csordás, C. D. Manning and C. Potts, "Do Language Models Use Their Depth Efficiently?"
(arXiv 2505.13898), which asks arithmetic and multi-hop questions; these texts are our own.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

from sparsecod_megatron.analysis.tasks.text import Pair
from sparsecod_megatron.errors import ConfigError

NUM_SHOTS = 2
"""Solved examples before each question, so that a model knows what is asked."""
CYCLE = 8
"""Letters of a question about hops; as many facts whatever the number of hops."""
MAX_DIGITS = 9


def addition(generator: np.random.Generator, digits: int) -> tuple[str, str]:
    """Two numbers of this many digits, and their sum with the end of the line."""
    first, second = generator.integers(10 ** (digits - 1), 10**digits, size=2).tolist()
    return f"{first}+{second}=", f"{first + second}\n"


def hops(generator: np.random.Generator, count: int) -> tuple[str, str]:
    """A cycle of letters as facts in random order, and where this many steps lead."""
    letters = generator.permutation(list(string.ascii_uppercase))[:CYCLE].tolist()
    facts = [f"{letter} to {letters[(place + 1) % CYCLE]}" for place, letter in enumerate(letters)]
    order = generator.permutation(CYCLE)
    start = int(generator.integers(CYCLE))
    text = ", ".join(facts[place] for place in order)
    return f"{text}. From {letters[start]}, steps {count}:", f" {letters[(start + count) % CYCLE]}\n"


BUILT_IN: dict[str, tuple[Callable[[np.random.Generator, int], tuple[str, str]], tuple[int, ...], int]] = {
    "addition": (addition, (1, 2, 3, 4), MAX_DIGITS),
    "hops": (hops, (1, 2, 3), CYCLE - 1),
}
"""Task → how a question of a difficulty is made, difficulties by default, the largest one."""


def make_pairs(name: str, difficulties: Sequence[int] | None, *, count: int, seed: int) -> list[Pair]:
    """Questions of a built-in task, all difficulties alike, in random order.

    Args:
        name: key of `BUILT_IN`.
        difficulties: digits or hops; None for the task's own.
        count: questions in all, at least one of each difficulty.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a difficulty that the task has not, or fewer questions than difficulties.
    """
    make, usual, largest = BUILT_IN[name]
    chosen = tuple(difficulties or usual)
    for difficulty in chosen:
        if not 1 <= difficulty <= largest:
            raise ConfigError(f"--difficulties {difficulty}: {name} has 1 to {largest}; choose among them")
    if count < len(chosen):
        raise ConfigError(f"--samples {count}: fewer than the {len(chosen)} difficulties of {name}; give more")
    generator = np.random.default_rng(seed)
    pairs = []
    for number in generator.permutation(count).tolist():
        difficulty = chosen[number % len(chosen)]
        shots = ["".join(make(generator, difficulty)) for _ in range(NUM_SHOTS)]
        prompt, answer = make(generator, difficulty)
        pairs.append(Pair("".join(shots) + prompt, answer, difficulty))
    return pairs
