"""A soup is the mean, shares the zeros of its models, and is refused where there is no such share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConversionError
from tests.helpers.decoders import tiny_decoder
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import VOCAB_SIZE, sequences, tiny


def pruned(seed: int | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with half of its weights zero, the same ones each time; the others by the seed."""
    model = compress(tiny("llama"), find_method("magnitude"), sequences(), batch_size=4).model.to(dtype)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator).to(dtype))
    return model


def soup(*models: PreTrainedModel) -> Compression:
    nothing = torch.zeros(0, 8, dtype=torch.int64)
    return compress(models[0], find_method("soups"), nothing, batch_size=1, others=models[1:])


def test_the_mean_keeps_the_zeros() -> None:
    models = [pruned(seed) for seed in (1, 2, 3)]
    means = {
        name: sum(model.get_parameter(name).detach().double() for model in models) / 3
        for name, _ in models[0].named_parameters()
    }
    result = soup(*models)
    for name, weight in result.model.named_parameters():
        torch.testing.assert_close(weight.double(), means[name], rtol=1e-6, atol=1e-8)
    for row in result.matrices:
        assert row.compressed and row.zeros == 0.5 and row.relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_are_their_own_mean(dtype: torch.dtype) -> None:
    """To the last bit, where a sum of seven over seven is not."""
    models = [pruned(1, dtype) for _ in range(7)]
    before = [weight.clone() for weight in models[0].parameters()]
    assert all(map(torch.equal, soup(*models).model.parameters(), before))


def test_models_in_bf16_are_averaged_in_fp32() -> None:
    """The mean of 256, 1 and 1 is 86; in bf16 their sum would be 256, and the mean 85.5."""
    models = [pruned(dtype=torch.bfloat16) for _ in range(3)]
    name, values = "model.norm.weight", (256.0, 1.0, 1.0)
    for model, value in zip(models, values, strict=True):
        torch.nn.init.constant_(model.get_parameter(name), value)
    assert soup(*models).model.get_parameter(name).unique().tolist() == [86.0]


def test_the_numbers_that_files_hold_beside_weights_are_averaged() -> None:
    models = [tiny_decoder("deepseek_v3") for _ in range(2)]
    assert models[0] is not None and models[1] is not None
    places = [name for name, _ in models[0].named_buffers() if name.endswith("e_score_correction_bias")]
    assert places
    for name in places:
        models[1].get_buffer(name).fill_(3.0)
    result = soup(*models)  # type: ignore[arg-type]
    assert all((result.model.get_buffer(name) == 1.5).all() for name in places)


def test_what_has_no_mean_is_refused() -> None:
    dense = tiny("llama")
    with pytest.raises(ConversionError) as caught:
        soup(pruned(1), pruned(2), dense)
    first = next(name for name, _ in eligible(dense))
    assert str(caught.value) == (
        f"{first}: 512 of 1024 weights are zero in the first model or in model 3 alone, and a mean would lose them; "
        "average models pruned once and then trained apart"
    )
    with pytest.raises(
        ConversionError, match=r"q_proj\.weight: the first model has \[32, 32\], model 2 has \[64, 32\]"
    ):
        soup(tiny("llama"), tiny("llama", head_dim=16))
    with pytest.raises(ConversionError, match=r"lm_head\.weight: the first model has nothing, model 2 has \[67, 32\]"):
        soup(tiny("llama"), untied())


def untied() -> PreTrainedModel:
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_what_configurations_do_not_share_is_named() -> None:
    result = soup(pruned(1), tiny_with_other_eps())
    assert result.warnings == [
        "model 2 has other values of rms_norm_eps in its configuration; the first model's are kept"
    ]


def tiny_with_other_eps() -> PreTrainedModel:
    model = pruned(2)
    model.config.rms_norm_eps = 1e-3
    return model


def test_the_command_takes_several_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(save_with_words(pruned(seed), tmp_path / str(seed))) for seed in (1, 2)]
    text = write_words(tmp_path / "words.txt", VOCAB_SIZE, 300)
    sizes = ["--samples", "6", "--held-out", "4", "--seq-length", "12", "--batch-size", "4", "--device", "cpu"]
    arguments = ["compress", "--method", "soups", "--data", str(text), "--output", str(tmp_path / "soup"), *sizes]
    assert main([*arguments, "--model", *folders]) == 0
    name = "model.layers.1.mlp.up_proj.weight"
    first, second, mean = (
        load_file(Path(folder) / "model.safetensors")[name] for folder in (*folders, tmp_path / "soup")
    )
    torch.testing.assert_close(mean, (first + second) / 2)
    assert main([*arguments, "--model", folders[0], "--overwrite"]) == 2
    assert "one given, and --method soups takes several" in capsys.readouterr().err
