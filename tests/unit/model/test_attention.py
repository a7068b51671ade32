"""Core attention against softmax written out, and the order in which context-parallel ranks hold a sequence."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.backend import select_backend

select_backend()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from sparsecod_megatron.model.attention import SDPAttention, zigzag_positions  # noqa: E402
from sparsecod_megatron.model.norms import RMSNorm  # noqa: E402


def config(**fields: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0, **fields)


@given(groups=st.sampled_from([1, 2, 4]), length=st.integers(1, 9), batch=st.integers(1, 3))
def test_equals_softmax(groups: int, length: int, batch: int) -> None:
    query, key, value = (torch.randn(length, batch, heads, 8) for heads in (4, groups, groups))
    attention = SDPAttention(config(), 1, AttnMaskType.causal, "self")
    ours = attention(query, key, value, None)
    keys, values = (x.repeat_interleave(4 // groups, dim=2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, keys) / 8**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), values).flatten(2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@given(cp_size=st.integers(1, 5), chunk=st.integers(1, 4))
def test_zigzag_is_a_partition_and_megatrons_own(cp_size: int, chunk: int) -> None:
    length = 2 * cp_size * chunk
    positions = zigzag_positions(length, cp_size, device=torch.device("cpu"))
    assert sorted(positions.flatten().tolist()) == list(range(length))
    # Source: Megatron-Core utils.py, get_batch_on_this_cp_rank: chunks r and 2n-1-r.
    view = torch.arange(length).view(2 * cp_size, chunk)
    for rank in range(cp_size):
        assert positions[rank].tolist() == torch.cat((view[rank], view[2 * cp_size - 1 - rank])).tolist()
        work = int((positions[rank] + 1).sum())
        assert work * cp_size == length * (length + 1) // 2


@given(tokens=st.integers(1, 5), scale=st.floats(1e-2, 1e2))
def test_rms_norm_is_its_formula(tokens: int, scale: float) -> None:
    norm = RMSNorm(config(layernorm_epsilon=1e-5), 32)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = scale * torch.randn(tokens, 2, 32)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_norm_weight_says_whether_the_sequence_is_sharded() -> None:
    sharded = config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(sharded, 32).weight.sequence_parallel is True
    assert RMSNorm(config(), 32).weight.sequence_parallel is False
