from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.transforms import Transform, folded, gate_up, query_key_value, same, scaled, zeros

SIZE = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def transforms(draw: st.DrawFn) -> Transform:
    a, b, c, d = (draw(SIZE) for _ in range(4))
    qkv = [query_key_value((a * (b + 2 + gated * b) * c, d), a * b, a, gated=gated) for gated in (False, True)]
    return draw(st.sampled_from([same((a, b)), scaled((a, b), 2.0), scaled((a,), 0.25), gate_up((2 * a, b)), *qkv]))


@settings(max_examples=200, deadline=None)
@given(transforms(), DTYPES, st.integers(0, 2**31))
def test_both_directions_invert_each_other_bit_for_bit(transform: Transform, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for shapes, there, back, shapes_there in (
        (transform.megatron_shapes, transform.to_hf, transform.to_megatron, transform.hf_shapes),
        (transform.hf_shapes, transform.to_megatron, transform.to_hf, transform.megatron_shapes),
    ):
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        converted = there(tensors)
        assert tuple(tuple(tensor.shape) for tensor in converted) == shapes_there
        assert all(torch.equal(x, y) for x, y in zip(tensors, back(converted), strict=True))


@settings(max_examples=50, deadline=None)
@given(groups=SIZE, per_group=SIZE, head_dim=SIZE)
def test_every_fused_row_goes_to_its_head(groups: int, per_group: int, head_dim: int) -> None:
    heads = groups * per_group
    rows = torch.arange((heads + 2 * groups) * head_dim).unsqueeze(1).float()
    query, key, value = query_key_value(tuple(rows.shape), heads, groups).to_hf([rows])
    for head in range(heads):
        group = head // per_group
        slot = group * (per_group + 2) + head % per_group
        for channel in range(head_dim):
            assert query[head * head_dim + channel] == slot * head_dim + channel
            assert key[group * head_dim + channel] == (group * (per_group + 2) + per_group) * head_dim + channel
            assert value[group * head_dim + channel] == (group * (per_group + 2) + per_group + 1) * head_dim + channel


def test_gate_is_the_upper_half() -> None:
    gate, up = gate_up((4, 1)).to_hf([torch.tensor([[1.0], [2.0], [3.0], [4.0]])])
    assert gate.flatten().tolist() == [1, 2]
    assert up.flatten().tolist() == [3, 4]


def test_scaling_by_anything_but_a_power_of_two_is_refused() -> None:
    with pytest.raises(AssertionError, match="not a power of two"):
        scaled((1,), 3.0)


def test_zeros_come_from_nothing_and_refuse_to_vanish_when_they_are_not_zero() -> None:
    transform = zeros((2,), (1, 3))
    made = transform.to_hf([])
    assert [tuple(tensor.shape) for tensor in made] == [(2,), (1, 3)]
    assert tuple(transform.to_megatron(made)) == ()
    made[1][0, 2] = float("nan")
    with pytest.raises(ConversionError, match="other than zero"):
        transform.to_megatron(made)


def test_folding_rounds_once() -> None:
    weight = torch.tensor([1.0, 3.0, -0.7])
    factor = 3**-0.5
    (found,) = folded((3,), factor).to_hf([weight])
    assert torch.equal(found, (weight.double() * factor).float())
    assert torch.equal(folded((3,), 1.0).to_hf([weight])[0], weight)


def test_gates_stand_between_queries_and_key_of_their_group() -> None:
    rows = torch.arange(2 * (2 + 2 + 2) * 1).unsqueeze(1).float()
    query, key, value, gate = query_key_value(tuple(rows.shape), 4, 2, gated=True).to_hf([rows])
    assert query.flatten().tolist() == [0, 1, 6, 7]
    assert gate.flatten().tolist() == [2, 3, 8, 9]
    assert (key.flatten().tolist(), value.flatten().tolist()) == ([4, 10], [5, 11])
