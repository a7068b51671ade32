"""Groups that are pruned whole and rounded: exact where nothing is asked, and against levels written out by hand."""

from __future__ import annotations

import pytest
import torch

from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.groups import round_groups
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConfigError
from tests.unit.compression.models import sequences, tiny


def gqsa(*settings: str, method: str = "gqsa") -> Compression:
    return compress(tiny("llama"), find_method(method, settings), sequences(), batch_size=4)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_goes_to_the_nearest_level_of_its_group(bits: int) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = round_groups(weight, 8, bits)
    for row in range(5):
        for start in range(0, 32, 8):
            group = weight[row, start : start + 8]
            levels = torch.linspace(float(group.min()), float(group.max()), 2**bits)
            nearest = levels[(group[:, None] - levels).abs().argmin(1)]
            assert torch.allclose(found[row, start : start + 8], nearest, atol=1e-6)


def test_equal_values_and_no_rounding_are_exact() -> None:
    weight = torch.randn(6, 4, 1).expand(6, 4, 8).flatten(1).contiguous()
    assert torch.equal(round_groups(weight, 8, 2), weight)
    other = torch.randn(6, 32)
    assert torch.equal(round_groups(other, 8, 16), other)
    result, dense = gqsa("pattern=group:16:0", "bits=16"), tiny("llama")
    for name, weight in dense.named_parameters():
        assert torch.equal(result.model.get_parameter(name), weight)


def test_zeros_fill_whole_aligned_groups_and_the_rest_is_what_the_mask_alone_leaves_rounded() -> None:
    rounded, masked = gqsa("pattern=group:8:0.5"), gqsa("pattern=group:8:0.5", method="obs")
    first = [row.name for row in masked.matrices if ".0." in row.name]  # later inputs differ with the first block
    for name in first:
        values, kept = (each.model.get_parameter(name).detach() for each in (rounded, masked))
        assert torch.equal(values, round_groups(kept, 8, 4))
        live = (kept != 0).unflatten(-1, (-1, 8)).any(-1)
        assert bool((live.sum(-1) == kept.shape[1] // 8 // 2).all()), "half of the groups of every row"
    plain = gqsa("pattern=0.5", "bits=16"), gqsa("pattern=group:16:0.5", "bits=16")
    assert torch.equal(*(each.model.get_parameter(first[0]) for each in plain)), "a plain share is of groups of 16"


def test_rounding_comes_after_healing() -> None:
    name, settings = "model.layers.0.mlp.up_proj.weight", ["pattern=group:16:0.5", "bits=2"]
    rounded, plain = gqsa(*settings, method="gqsa+cg"), gqsa(*settings)
    healed = gqsa("pattern=group:16:0.5", method="obs+cg").model.get_parameter(name)
    found = rounded.model.get_parameter(name)
    assert torch.equal(found, round_groups(healed, 16, 2))
    assert max(len(group.unique()) for group in found.unflatten(-1, (-1, 16)).flatten(0, -2)) == 4
    errors = [{row.name: row.output_error for row in each.matrices}[name] for each in (rounded, plain)]
    assert errors[0] is not None and errors[1] is not None and errors[0] < errors[1]


@pytest.mark.parametrize(
    ("method", "pattern", "message"),
    [
        ("gqsa", "2:4", "n:m has no groups to round; give pattern=0.5 or group:16:0.5"),
        ("gqsa", "group:1:0.5", "pattern group:1:0.5: a group has two weights or more; give a share alone"),
        ("wanda", "group:16:0", "--method wanda: a share of 0 prunes nothing; give one above 0"),
    ],
)
def test_what_has_no_groups_or_prunes_nothing_is_refused(method: str, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_method(method, [f"pattern={pattern}"])
