"""The gate on a deep model with large logits and a massive channel: its rounding passes, a tensor off by 1e-3 fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import ParityReport, choose_family, export_model
from sparsecod_megatron.hf.rounding import CHANNEL_FACTOR, PASSES, channel_limits
from sparsecod_megatron.hf.verify import Verification, verify_directory
from tests.helpers.megatron import SMALL, BuiltModel, megatron_model

DEEP = ("model.num_layers=30",)
MASSIVE = 5
"""Channel of the residual stream; other channels' values are some thousand times smaller."""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[[], Verification]]]:
    """The export, and what compares it with its model."""
    folder = tmp_path_factory.mktemp("deep") / "m"
    model = load_config(None, [*SMALL, *DEEP]).model
    torch.manual_seed(0)
    with megatron_model(*DEEP) as built:
        built.eval()
        own = dict(built.named_parameters())
        with torch.no_grad():
            own["embedding.word_embeddings.weight"][:, MASSIVE] += 3000.0
            own["decoder.layers.29.mlp.linear_fc2.weight"][MASSIVE] -= 500.0  # which the last layer takes away again
            own["output_layer.weight"].mul_(30.0)
        named = {name: own[name].detach().clone() for name in choose_family(model).table(model).megatron_shapes}
        export_model(model, named, folder, seq_length=16, dtype=torch.float32, tokenizer_dir=None)

        def compare() -> Verification:
            return verify_directory(
                lambda: nullcontext(BuiltModel(built)),
                model,
                folder,
                exported_as=torch.float32,
                seq_length=16,
                generator=torch.Generator().manual_seed(3),
            )

        yield folder, compare


def test_its_own_rounding_passes(gate: tuple[Path, Callable[[], Verification]]) -> None:
    report = gate[1]().random
    report.require()
    # What an absolute limit of 1e-4 refused.
    assert report.largest_logit > 30
    assert report.max_difference > 1e-5


def noise(tensor: Tensor) -> Tensor:
    """Of 1e-3 of the tensor's size, but nothing in the massive channel."""
    change = (
        1e-3 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
    )
    if tensor.shape[0] == 32:
        change[MASSIVE] = 0
    return change


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.17.self_attn.q_proj",
        "model.layers.17.self_attn.o_proj",
        "model.layers.29.mlp.down_proj",
        "model.norm",
        "lm_head",
    ],
)
def test_a_tensor_off_by_a_thousandth_is_named(name: str, gate: tuple[Path, Callable[[], Verification]]) -> None:
    folder, compare = gate
    path = folder / "model.safetensors"
    good = load_file(path)
    wrong = good[f"{name}.weight"] + noise(good[f"{name}.weight"])
    save_file(good | {f"{name}.weight": wrong}, path, metadata={"format": "pt"})
    try:
        with pytest.raises(ConversionError, match=rf"first tensor that differs: .*: {name}\.weight"):
            compare().require()
    finally:
        save_file(good, path, metadata={"format": "pt"})


def test_a_channel_is_not_judged_by_another() -> None:
    largest = torch.tensor([1.0, 2.0, 1.0, 5000.0, 1.5], dtype=torch.float64)
    limits = channel_limits(1e-7 * largest, largest)
    assert limits[3] == pytest.approx(CHANNEL_FACTOR * 5e-4)
    assert float(limits[[0, 1, 2, 4]].max()) <= CHANNEL_FACTOR * 2e-7


def test_luck_in_one_of_many_channels_refuses_nothing() -> None:
    """Rounding that one massive token decides in each channel, ours 1.6 times theirs, as in SmolLM2's activations."""
    generator = torch.Generator().manual_seed(0)
    size = 1e-5 * torch.rand(300_000, generator=generator).double()
    theirs, ours = (torch.randn(number, len(size), generator=generator).abs() * size for number in (PASSES, 1))
    limits = channel_limits(theirs.amax(0), torch.ones_like(size))
    assert float((1.6 * ours[0] / limits).max()) < 0.8


def test_rounding_that_would_hide_a_wrong_tensor_is_told() -> None:
    report = ParityReport(Path("m"), 16, 0.01, 0.001, 1.0, (0, 0, 0), 0.05, 10.0, None)
    with pytest.raises(
        ConversionError, match=r"rounding alone moves its logits by 0\.05 .*--no-verify skips"
    ) as caught:
        report.require()
    assert "\n" not in str(caught.value)
