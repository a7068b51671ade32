"""Tasks as texts: pairs of prompt and answer from a file of JSON lines, or made here, as tokens of any tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.tasks.items import Answered
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """A question as text.

    Attributes:
        prompt: what the model reads first.
        answer: what it is to say, with what ends it, such as a line break.
        difficulty: a whole number; larger is harder.
    """

    prompt: str
    answer: str
    difficulty: int


def read_pairs(path: Path) -> list[Pair]:
    """Objects with `prompt`, `answer` and `difficulty`, one per line.

    Raises:
        DataError: no such file, a line that is not such an object, or none at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--task {path}: cannot be read as text ({error}); give a file of JSON lines") from None
    pairs = [_pair(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise DataError(f"--task {path}: holds no question; write one JSON object per line")
    return pairs


def digit_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """bool [ids]: those whose text, spaces aside, consists of digits."""
    texts = (tokenizer.decode([number]).strip() for number in range(len(tokenizer)))
    return torch.tensor([text.isascii() and text.isdigit() for text in texts])


def _pair(line: str, where: str) -> Pair:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); write one object per line") from None
    for key, kind, what in (
        ("prompt", str, "a text"),
        ("answer", str, "a text"),
        ("difficulty", int, "a whole number"),
    ):
        value = found.get(key) if isinstance(found, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise DataError(
                f"{where}: {key} is {json.dumps(value)}, not {what}; write "
                '{"prompt": "12+34=", "answer": "46\\n", "difficulty": 2}'
            )
    return Pair(found["prompt"], found["answer"], found["difficulty"])


def drawn(pairs: Sequence[Pair], count: int, *, seed: int) -> list[Pair]:
    """So many of the pairs, drawn at random; all of them in their order where there are no more."""
    if len(pairs) <= count:
        return [*pairs]
    return [pairs[place] for place in np.random.default_rng(seed).permutation(len(pairs))[:count]]


def tokenised(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, leading: int | None, name: str
) -> list[Answered]:
    """The pairs in tokens.

    Prompt and answer are tokenised together, as the model would read them; the answer begins where that departs from
    the prompt's own tokens, so a token that spans both is the answer's.

    Args:
        pairs: texts.
        tokenizer: the model's.
        leading: id that stands before the text; None leaves it out.
        name: of the task, for messages.

    Raises:
        DataError: nothing is left of a prompt for the model to read, or of an answer to say.
    """
    before = [] if leading is None else [leading]
    found = []
    for number, pair in enumerate(pairs, start=1):
        whole, prompt = (
            [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
            for text in (pair.prompt + pair.answer, pair.prompt)
        )
        start = next(
            (place for place, ids in enumerate(zip(whole, prompt, strict=False)) if ids[0] != ids[1]), len(prompt)
        )
        if start < 1 or start >= len(whole):
            raise DataError(
                f"--task {name}: question {number} ({pair.prompt[-20:]!r}, {pair.answer!r}) leaves the model nothing "
                "to read or nothing to say; lengthen its prompt or answer"
            )
        found.append(Answered(whole, start, pair.difficulty))
    return found
