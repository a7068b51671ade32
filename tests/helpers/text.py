"""Text with something to learn, made on the spot: sentences of a small grammar, the same for the same seed."""

from __future__ import annotations

import random
from pathlib import Path

_SUBJECTS = ("the layer", "a router", "the residual stream", "an expert", "the optimizer", "a token", "the gradient")
_VERBS = ("adds", "scales", "skips", "routes", "normalises", "remembers", "forgets")
_OBJECTS = (
    "its variance",
    "two experts",
    "the next block",
    "every head",
    "a small step",
    "the last word",
    "nothing at all",
)
_ENDS = ("at depth", "in the middle", "for ever", "once a step", "without a sound", "by design")


def write_corpus(directory: Path, *, documents: int = 60, sentences: int = 60, seed: int = 0) -> Path:
    """A folder of text files, about 3 KB each."""
    generator = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        lines = [
            f"{generator.choice(_SUBJECTS).capitalize()} {generator.choice(_VERBS)} {generator.choice(_OBJECTS)} "
            f"{generator.choice(_ENDS)}, {generator.randrange(1000)} times."
            for _ in range(sentences)
        ]
        (directory / f"{index:03d}.txt").write_text("\n".join(lines) + "\n")
    return directory
