"""Attention statistics against a naive computation on the model's own weights, and heads whose pattern is planted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.attention import MAX_SCORES, NAME
from sparsecod_megatron.analysis.sparsity.attention_rows import EPSILONS, STATISTICS, row_statistics
from sparsecod_megatron.analysis.sparsity.attention_score import Attention, RowRecorder, record_rows
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.calls import sequence_losses
from tests.helpers.decoders import tiny_decoder
from tests.unit.analysis.sparsity.tiny import CONFIGS, VOCAB, sample, tiny_model


def naive(alpha: np.ndarray, visible: int, query: int, seq_length: int) -> list[float]:
    """One row, written out in fp64."""
    alpha = alpha.astype(np.float64)
    used = alpha[alpha > 0]
    entropy = float(-(used * np.log(used)).sum())
    mass, keys = 0.0, 0
    for weight in sorted(alpha, reverse=True):
        mass, keys = mass + weight, keys + 1
        if mass >= 0.95 - 1e-6:
            break
    return [
        *(float(alpha[alpha < np.float32(epsilon / seq_length)].sum()) for epsilon in EPSILONS),
        float((alpha**2).sum()),
        entropy / math.log(seq_length),
        entropy / math.log(visible) if visible > 1 else 0.0,
        keys,
        float(alpha[0]),
        float(sum(weight * (query - key) for key, weight in enumerate(alpha))),
    ]


def naive_layers(context: Context, model: PreTrainedModel, window: dict[int, int]) -> dict[int, np.ndarray]:
    """All rows of all layers from the weights that the model's own eager attention returns."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=context.windows[:, :-1], output_attentions=True, use_cache=False).attentions
    result = {}
    for layer, alpha in enumerate(attentions):
        length = alpha.shape[-1]
        seen = [min(query + 1, window.get(layer, length)) for query in range(length)]
        rows = [
            [[naive(head[q].numpy(), seen[q], q, length) for q in range(length)] for head in sequence]
            for sequence in alpha
        ]
        result[layer] = np.array(rows).mean(2)
    return result


@pytest.mark.parametrize("family", CONFIGS)
def test_recorded_statistics_are_those_of_the_full_rows(family: str) -> None:
    model = tiny_model(family)
    context = sample(model, num_samples=3)
    before = model.config._attn_implementation
    found = record_rows(context, max_scores=3 * 4 * 24 * 5)  # five queries at a time
    assert model.config._attn_implementation == before
    assert not isinstance(ALL_ATTENTION_FUNCTIONS[NAME], RowRecorder)  # nor the rows it keeps
    windows = {"mistral": {0: 5, 1: 5}, "gemma2": {0: 6}, "gpt_oss": {0: 5}}.get(family, {})
    expected = naive_layers(context, model, windows)
    assert found.keys() == expected.keys()
    for layer, rows in expected.items():
        np.testing.assert_allclose(found[layer].numpy(), rows, rtol=2e-4, atol=2e-5)


def test_chunks_do_not_change_the_numbers_nor_hold_more_than_they_may() -> None:
    context = sample(tiny_model("llama"))
    whole, parts = record_rows(context, 1 << 24), record_rows(context, 1)
    for layer, rows in whole.items():
        torch.testing.assert_close(parts[layer], rows, rtol=1e-4, atol=1e-5)


def test_uniform_rows() -> None:
    length = 20
    alpha = torch.tril(torch.ones(length, length))
    alpha = alpha / alpha.sum(-1, keepdim=True)
    visible = torch.arange(1, length + 1)
    found = dict(zip(STATISTICS, row_statistics(alpha, visible, 0, length).T, strict=True))
    torch.testing.assert_close(found["square_sum"], 1 / visible)
    torch.testing.assert_close(found["entropy_visible"][1:], torch.ones(length - 1))
    torch.testing.assert_close(found["entropy"], visible.log() / math.log(length))
    assert found["keys_95"].tolist() == [math.ceil(0.95 * count - 1e-9) for count in visible.tolist()]
    torch.testing.assert_close(found["distance_tokens"], (visible - 1) / 2)


def _planted_heads() -> PreTrainedModel:
    """A GPT-2 whose block 0 has a sink head, a head of the token itself, and two uniform ones, for any text."""
    model = tiny_model("gpt2", n_embd=32, n_head=4)
    attention, width = model.transformer.h[0].attn, 8
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, :16] = _position_codes(64, 16)
        model.transformer.h[0].ln_1.weight.fill_(1)
        weight, bias = attention.c_attn.weight, attention.c_attn.bias  # [32, q | k | v]
        weight[:, :64].zero_()
        bias[:64].zero_()
        bias[0] = 1.0  # sink head: every query asks for what only position 0's key carries
        weight[:16, 32] = 40.0 * model.transformer.wpe.weight[0, :16]
        code = torch.eye(16)[:, :8] * 12.0  # self head: query and key carry the same code of the position
        weight[:16, width : 2 * width] = code
        weight[:16, 32 + width : 32 + 2 * width] = code
    return model


def _position_codes(length: int, width: int) -> Tensor:
    """Codes whose inner product is largest with themselves; the first differs most from all others."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(length, width, generator=generator)
    codes[:, 8:] = 0
    return codes / codes.norm(dim=1, keepdim=True)


def test_planted_sink_and_local_heads_are_recovered() -> None:
    context = sample(_planted_heads())
    rows = {row["head"]: row for row in Attention().run(context).tables["attention"] if row["layer"] == 0}
    uniform = sum(1 / (query + 1) for query in range(24)) / 24
    assert rows[0]["sink"] > 0.95 and rows[0]["keys_95"] < 1.5 and rows[0]["distance_tokens"] > 11
    assert rows[1]["distance_tokens"] < 0.5 and rows[1]["keys_95"] < 1.5 and rows[1]["sink"] < 0.1
    for head in (2, 3):
        assert rows[head]["square_sum"] == pytest.approx(uniform, rel=1e-4)
        assert rows[head]["entropy_visible"] == pytest.approx(23 / 24, rel=1e-4)


def test_intervals_hold_the_mean_of_the_sequences() -> None:
    result = Attention().run(sample(tiny_model("llama"), num_samples=12))
    for name in STATISTICS:
        value = result.values[name]
        assert value["low"] <= value["value"] <= value["high"]
        assert value["value"] == pytest.approx(np.mean(result.per_sequence[name]), rel=1e-6)


def test_attention_that_cannot_be_exchanged_is_refused() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    context = sample(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ConversionError, match="BloomForCausalLM.*leave attention out"):
        Attention().run(context)


def test_all_attentions_of_a_block_are_counted() -> None:
    """LongCat's blocks attend twice; their rows were taken for those of further sequences."""
    context = sample(tiny_decoder("longcat_flash"), num_samples=3)
    rows = record_rows(context, MAX_SCORES)
    assert {found.shape[:2] for found in rows.values()} == {(3, 2 * context.model.config.num_attention_heads)}
    assert Attention().run(context).num_sequences == 3


def test_wrong_attention_is_refused_where_the_loss_hardly_shows_it() -> None:
    """A difference of 0.01 nats was once allowed, whatever the attention did."""
    model = tiny_model("llama")
    context = sample(model)
    model.lm_head.weight.mul_(1e-3)
    tokens, labels = context.windows[:, :-1], context.windows[:, 1:]
    own = sequence_losses(model(input_ids=tokens).logits, labels)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def hotter(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attend(module, 1.5 * query, *args, **kwargs)

    AttentionInterface.register("hotter", hotter)
    AttentionMaskInterface.register("hotter", sdpa_mask)
    model.set_attn_implementation("hotter")
    assert (sequence_losses(model(input_ids=tokens).logits, labels) - own).abs().max() < 0.01
    with pytest.raises(ConversionError, match="LlamaAttention of block 0: recomputed, it gives other outputs"):
        Attention().run(context)
