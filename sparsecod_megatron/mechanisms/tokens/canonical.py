"""Tokens that are written alike up to case, accents and spaces, as one: what n-grams are counted in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, normalizers
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "\ue000"
"""Stands for a token that is a space, while others lose theirs."""
_NOT_TEXT = "\ufffd"
"""In the text of a token that is a part of a character."""


def canonical_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Tensor:
    """The smallest number for each token that all tokens share which are written like it, int32 [vocab_size].

    NFKC, NFD, without accents, in lower case, runs of spaces as one, none at the ends. Ids that the tokenizer has not
    stand for themselves, behind all others.

    Args:
        tokenizer: of the run.
        vocab_size: rows of the embedding.

    Source: Cheng et al. (arXiv 2601.07372), section on tokenizer compression; the order of steps was read in
    AI-Hypercomputer/maxtext, src/maxtext/layers/engram.py.
    """
    spelling = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )
    known = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[token] for token in range(known)], skip_special_tokens=False)
    special, numbers, ids = set(tokenizer.all_special_ids), dict[tuple[str, bool], int](), []
    for token, text in enumerate(texts):
        is_text = _NOT_TEXT not in text and token not in special
        name = spelling.normalize_str(text) or text if is_text else str(tokenizer.convert_ids_to_tokens(token))
        # A part of a character, or a special token, is not the text that its name looks like.
        ids.append(numbers.setdefault((name, is_text), len(numbers)))
    ids += range(len(numbers), len(numbers) + vocab_size - known)
    return torch.tensor(ids, dtype=torch.int32)
