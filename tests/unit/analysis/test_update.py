"""The update score: dense updates have no excess at any size and in either format, planted ones are found exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsecod_megatron.analysis.sparsity.ranks import ranks
from sparsecod_megatron.analysis.update import Steps, measure_update
from sparsecod_megatron.cli.main import main
from sparsecod_megatron.errors import ConversionError
from tests.helpers.words import save_with_words
from tests.unit.analysis.scores.families import tiny

NAME = "model.layers.3.mlp.up_proj.weight"
PUBLISHED = {1e-6: 0.967, 1e-5: 0.802, 3e-5: 0.598, 1e-4: 0.304}
"""Size of a dense update → share of bf16 weights of standard deviation 0.02 that stay as they are."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sigma", PUBLISHED)
def test_a_dense_update_has_no_excess(sigma: float, dtype: torch.dtype) -> None:
    weight = 0.02 * normal(700, 700, seed=0)
    after = weight + sigma * normal(700, 700, seed=1)
    row = measure_update({NAME: weight.to(dtype)}, {NAME: after.to(dtype)}).tables["update"][0]
    assert row["unchanged_bf16"] == pytest.approx(PUBLISHED[sigma], abs=2e-3)
    assert row["excess"] == pytest.approx(0, abs=2e-3)
    assert row["update_rms"] == pytest.approx(sigma, rel=0.03)
    assert (row["layer"], row["kind"]) == (3, "mlp.up_proj.weight")


def test_a_planted_mask_is_recovered() -> None:
    weight = 0.02 * normal(400, 300, seed=0)
    mask = torch.rand(400, 300, generator=torch.Generator().manual_seed(2)) < 0.1
    other = torch.rand(400, 300, generator=torch.Generator().manual_seed(3)) < 0.3
    # By many steps of the format, so that rounding hides none of it.
    models = [{NAME: weight + 0.1 * changed} for changed in (mask, other)]
    row = measure_update({NAME: weight}, *models).tables["update"][0]
    assert row["unchanged_stored"] == row["unchanged_bf16"] == float((~mask).double().mean())
    assert row["excess"] > 0.85
    assert row["overlap"] == pytest.approx(float((mask & other).sum() / mask.sum()))
    assert row["overlap_by_chance"] == float(other.double().mean())


def test_the_baseline_is_that_of_a_loop() -> None:
    weight = torch.tensor([1.0, 1.5, -3.0, 0.0])
    steps = [2.0**-7, 2.0**-7, 2.0**-6]
    draws = 0.01 * normal(200_000, seed=0).double()
    expected = sum(float((1 - draws.abs() / step).clamp_min(0).mean()) for step in steps) / 4
    assert Steps.of(weight).unchanged(0.01) == pytest.approx(expected, abs=2e-3)
    assert Steps.of(weight).unchanged(0.0) == 1


@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_of_a_planted_update(rank: int) -> None:
    left, right = (torch.linalg.qr(normal(40, 40, seed=seed).double())[0][:, :rank] for seed in (0, 1))
    matrix = 0.01 * left @ right.T
    assert ranks(matrix) == pytest.approx((rank, rank), rel=1e-3)
    assert ranks(torch.stack([matrix, 0 * matrix])) == pytest.approx((rank / 2, rank / 2), rel=1e-3)
    singular = torch.linalg.svdvals(normal(20, 30, seed=2).double())
    shares = singular / singular.sum()
    expected = (float(singular.square().sum() / singular[0] ** 2), float((-shares * shares.log()).sum().exp()))
    assert ranks(normal(20, 30, seed=2)) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_compared_is_named() -> None:
    weight = normal(4, 4, seed=0)
    with pytest.raises(ConversionError, match=rf"{NAME} has the shapes \[4, 4\], \[2, 8\]"):
        measure_update({NAME: weight}, {NAME: weight.view(2, 8)})
    with pytest.raises(ConversionError, match="no tensor in common"):
        measure_update({NAME: weight}, {"a": weight})
    result = measure_update({NAME: weight, "head": weight}, {NAME: weight.bfloat16()})
    assert [len(result.warnings), result.values["unchanged_stored"]] == [2, None]
    assert "1 tensors are not in every model and are left out, such as head" in result.warnings[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (save_with_words(tiny("llama"), tmp_path / name) for name in ("before", "after"))
    tensors = load_file(after / "model.safetensors")
    changed = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {changed: tensors[changed] + 1}, after / "model.safetensors", metadata={"format": "pt"})
    arguments = ["analyze", str(before), str(after), "--scores", "update", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    values = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["update"]["values"]
    share = 1 - tensors[changed].numel() / sum(tensor.numel() for tensor in tensors.values())
    assert values["unchanged_stored"] == pytest.approx(share)
    assert (tmp_path / "out/update_by_layer.csv").is_file()
    capsys.readouterr()
    for wrong, message in (
        ([*arguments, "--data", "x"], "leave --data, --nproc and other scores out"),
        (["analyze", str(before), "--scores", "update", "--output", str(tmp_path / "o")], "1 models given"),
        (
            [*arguments[:3], "--data", "x", "--output", str(tmp_path / "o")],
            "only --every-checkpoint and --scores update take several",
        ),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
