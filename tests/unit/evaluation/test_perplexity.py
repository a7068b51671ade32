"""Perplexity against transformers, one token at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from sparsecod_megatron.errors import CheckpointError, ConfigError, DataError
from sparsecod_megatron.evaluation.perplexity import exp, plan_windows
from tests.helpers.perplexity import perplexity

VOCAB_SIZE = 300


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1))


def naive_losses(model: LlamaForCausalLM, tokens: torch.Tensor, seq_length: int, stride: int) -> list[float]:
    """Each token from its own forward pass, with the context that the first window reaching it holds."""
    losses = []
    for target in range(1, len(tokens)):
        start = max(0, math.ceil((target - seq_length) / stride)) * stride
        with torch.no_grad():
            logits = model(tokens[None, start:target]).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, dim=-1)[tokens[target]].item())
    return losses


@pytest.mark.parametrize(
    ("length", "seq_length", "stride", "batch_size"),
    [
        (70, 16, None, 3),
        (65, 16, None, 8),
        (66, 16, 16, 1),
        (50, 16, 5, 4),
        (40, 16, 1, 7),
        (12, 64, None, 2),
        (2, 8, None, 1),
    ],
)
def test_equals_one_token_at_a_time(
    model: LlamaForCausalLM, length: int, seq_length: int, stride: int | None, batch_size: int
) -> None:
    tokens = random_tokens(length)
    result = perplexity(
        model, tokens, seq_length=seq_length, stride=stride, batch_size=batch_size, num_bytes=3 * length
    )
    expected = naive_losses(model, tokens, seq_length, stride or seq_length)
    assert result.num_tokens == len(expected) == length - 1
    assert result.loss == pytest.approx(np.mean(expected), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(np.sum(expected) / math.log(2) / (3 * length), rel=1e-5)


@given(num_tokens=st.integers(2, 200), seq_length=st.integers(1, 40), data=st.data())
def test_every_token_is_scored_once_with_context(num_tokens: int, seq_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_length))
    windows = plan_windows(num_tokens, seq_length, stride)
    scored = [target for window in windows for target in range(window.first, window.end + 1)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert 0 < window.end - window.start <= seq_length
        assert window.first > window.start
    for window in windows[1:]:
        assert window.first - window.start == seq_length - stride + 1
    assert {window.end - window.start for window in windows[:-1]} <= {seq_length}


def test_uniform_predictions_have_the_vocabulary_as_perplexity(model: LlamaForCausalLM) -> None:
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    result = perplexity(uniform, random_tokens(100), seq_length=8)
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.loss_stderr == pytest.approx(0, abs=1e-6)


def test_bootstrap_agrees_with_the_error_of_a_mean(model: LlamaForCausalLM) -> None:
    tokens = random_tokens(4 * 200 + 1)
    result = perplexity(model, tokens, seq_length=4, batch_size=64, seed=3)
    windows = [naive_losses(model, tokens[start : start + 5], 4, 4) for start in range(0, 800, 4)]
    means = np.mean(windows, axis=1)
    assert result.num_windows == 200
    assert result.loss_stderr == pytest.approx(means.std(ddof=1) / math.sqrt(200), rel=0.1)
    assert result.loss_low is not None and result.loss_high is not None
    assert result.loss_high - result.loss_low == pytest.approx(2 * 1.96 * result.loss_stderr, rel=0.1)
    assert result.loss_low < result.loss < result.loss_high
    assert perplexity(model, tokens, seq_length=4, batch_size=64, seed=3) == result
    other = perplexity(model, tokens, seq_length=4, batch_size=64, seed=4)
    assert other.loss == result.loss and other.loss_low != result.loss_low


def test_one_window_has_no_interval(model: LlamaForCausalLM) -> None:
    result = perplexity(model, random_tokens(9), seq_length=8)
    assert (result.num_windows, result.loss_stderr, result.loss_low, result.loss_high) == (1, None, None, None)
    assert result.bits_per_byte is None


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1])
def test_token_outside_the_vocabulary(model: LlamaForCausalLM, bad: int) -> None:
    tokens = random_tokens(20)
    tokens[13] = bad
    with pytest.raises(DataError, match=f"token id {bad} at position 13.*{VOCAB_SIZE}"):
        perplexity(model, tokens, seq_length=8)


def test_refuses_what_it_cannot_score(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="1 tokens"):
        perplexity(model, random_tokens(1), seq_length=8)
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"--stride {stride}"):
            perplexity(model, random_tokens(20), seq_length=8, stride=stride)


def test_nan_weights_are_an_error_not_a_result(model: LlamaForCausalLM) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[17] = math.nan
    tokens = torch.full((40,), 5)
    tokens[20] = 17
    with pytest.raises(CheckpointError, match="tokens 17 to 24 is non-finite"):
        perplexity(broken, tokens, seq_length=8)


def test_exp_of_a_diverged_loss() -> None:
    assert exp(2.0) == pytest.approx(math.e**2)
    assert exp(1e4) == math.inf
