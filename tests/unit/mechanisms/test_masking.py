"""What masks do to values, against torch's own formulas over the whole."""

from __future__ import annotations

import pytest
import torch

from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.blocks import BLOCK_ELEMENTS

ELEMENTS = BLOCK_ELEMENTS + 1001  # a block and a part of one


@pytest.fixture(name="marked")
def _marked() -> torch.Tensor:
    return torch.rand(ELEMENTS, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.fixture(name="values", params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def _values(request: pytest.FixtureRequest) -> torch.Tensor:
    values = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1)).to(request.param)
    values[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1.0])
    return values


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(masking.INTEGER_TYPES[values.element_size()])


def test_marked_values_become_zero_bit_for_bit(values: torch.Tensor, marked: torch.Tensor) -> None:
    """Infinities, NaN and negative zeros are marked too; what is not marked keeps its bits."""
    marked[:6] = True
    expected = values.masked_fill(marked, 0.0)
    copy = masking.zeroed(values, marked)
    assert not torch.equal(_bits(values), _bits(expected))
    assert torch.equal(_bits(copy), _bits(expected))
    masking.zero_(values, marked)
    assert torch.equal(_bits(values), _bits(expected))


def test_marked_values_are_scaled(marked: torch.Tensor) -> None:
    """Those without a mark keep their bits."""
    values = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    expected = torch.where(marked, values * 0.3, values)
    before = values.clone()
    masking.scale_(values, marked, 0.3)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    assert torch.equal(values[~marked], before[~marked])


def test_something_is_added_where_marked(marked: torch.Tensor) -> None:
    """The factor times the other value, nothing elsewhere."""
    values, other = torch.randn(2, ELEMENTS, generator=torch.Generator().manual_seed(1))
    expected = values + 0.3 * marked * other
    masking.add_(values, marked, other, 0.3)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
