"""Models from configurations: shapes, initialisation, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from tests.helpers.megatron import SMALL, megatron_model, run_forward

select_backend()

from sparsecod_megatron.model import transformer_config  # noqa: E402

WIDE = ("model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_layers=8")


def fresh_std(*overrides: str) -> dict[str, float]:
    """Standard deviation of each kind of matrix of a model as it is built."""
    config = load_config(None, [*SMALL, *WIDE, *overrides])
    backend = select_backend()
    from sparsecod_megatron.model import build_model
    from sparsecod_megatron.parallel import running_processes

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=False)
        model = build_model(config, megatron, groups, device=backend.device, transformer_engine=False)[0]
        return {
            name.removeprefix("decoder.layers.2."): float(parameter.detach().std())
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2
        }


@pytest.mark.parametrize("init", ["normal", "scaled"])
def test_output_projections_are_scaled_only_when_asked(init: str) -> None:
    """sigma everywhere, or sigma / sqrt(2 L) on what is added to the residual stream."""
    std = fresh_std(f"model.init={init}")
    output = 0.02 if init == "normal" else 0.02 / 16**0.5
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert std[name] == pytest.approx(output, rel=0.03)
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "embedding.word_embeddings.weight"):
        assert std[name] == pytest.approx(0.02, rel=0.03)


def test_tied_embeddings_have_one_matrix() -> None:
    with megatron_model("model.untie_embeddings_and_output_weights=false") as model:
        names = dict(model.named_parameters())
        assert "output_layer.weight" not in names
        assert run_forward(model, torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)


def test_causality() -> None:
    """A later token changes no earlier logit."""
    with megatron_model() as model:
        tokens = torch.randint(0, 64, (1, 12))
        changed = tokens.clone()
        changed[0, 8] = (changed[0, 8] + 1) % 64
        before, after = run_forward(model, tokens), run_forward(model, changed)
        torch.testing.assert_close(before[:, :8], after[:, :8])
        assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (50280, 50304)])
def test_vocabulary_is_padded_alike_in_every_layout(size: int, padded: int) -> None:
    assert load_config(None).model.padded_vocab_size(size) == padded


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("megatron.recompute_granularit=full", "did you mean 'recompute_granularity'?"),
        ("megatron.hidden_size=64", "model.hidden_size says what it is"),
        ("megatron.batch_p2p_comm=true", "wrong gradients on the CPU backend"),
        ("megatron.overlap_p2p_comm=true", "wrong gradients on the CPU backend"),
        ("megatron.recompute_granularity=selective megatron.recompute_modules=[moe_act]", "Megatron-Core refuses"),
    ],
)
def test_passthrough_mistakes(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("?", r"\?")):
        transformer_config(load_config(None, [*SMALL, *override.split()]), transformer_engine=False)


def test_passthrough_reaches_megatron() -> None:
    config = load_config(None, [*SMALL, "megatron.recompute_granularity=selective", "megatron.glu_linear_offset=0.5"])
    megatron = transformer_config(config, transformer_engine=False)
    assert megatron.recompute_granularity == "selective" and megatron.glu_linear_offset == 0.5
