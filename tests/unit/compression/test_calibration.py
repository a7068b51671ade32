"""Calibration and held-out text never overlap, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.compression.calibration import split_text
from sparsecod_megatron.errors import DataError

COUNTS = st.integers(1, 5)


@given(num_samples=COUNTS, num_held_out=COUNTS, seq_length=COUNTS, spare=st.integers(0, 40), seed=COUNTS)
def test_parts_are_disjoint(num_samples: int, num_held_out: int, seq_length: int, spare: int, seed: int) -> None:
    needed = (num_samples + num_held_out) * seq_length + 1
    sizes = {"num_samples": num_samples, "num_held_out": num_held_out, "seq_length": seq_length, "seed": seed}
    tokens = torch.arange(needed + spare)
    text = split_text(tokens, vocab_size=len(tokens), **sizes)
    assert text.calibration.shape == (num_samples, seq_length)
    assert torch.equal(text.held_out, tokens[-num_held_out * seq_length - 1 :])
    drawn = text.calibration.flatten().tolist()
    assert len({*drawn, *text.held_out.tolist()}) == len(drawn) + len(text.held_out)
    assert all(torch.equal(row, row[0] + torch.arange(seq_length)) for row in text.calibration)
    with pytest.raises(DataError, match=f"need {needed}; give more text"):
        split_text(tokens[: needed - 1], vocab_size=len(tokens), **sizes)
    with pytest.raises(DataError, match=f"token id {len(tokens) - 1}, but"):
        split_text(tokens, vocab_size=len(tokens) - 1, **sizes)
