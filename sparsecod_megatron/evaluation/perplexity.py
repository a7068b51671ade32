"""Token-level cross entropy of a causal LM on a token stream, each token scored exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sparsecod_megatron.errors import CheckpointError, ConfigError, DataError
from sparsecod_megatron.hf.blocks import find_layers
from sparsecod_megatron.hf.calls import Replay
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.hf.residual_stream import ResidualStream
from sparsecod_megatron.parallel.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class PerplexityResult:
    """Cross entropy of a token stream.

    Attributes:
        loss: nats per token, Σ loss ÷ Σ tokens.
        perplexity: `exp(loss)`.
        bits_per_byte: Σ loss in bits ÷ bytes of text; None where the bytes are not known.
        num_tokens: scored tokens: all but the stream's first.
        num_bytes: bytes of their text, or None.
        num_windows: forward passes' rows, the unit of the bootstrap.
        seq_length: tokens of context and target that the model sees at most.
        stride: tokens from one window to the next.
        loss_stderr: bootstrap standard error of `loss`; None for a single window, as are the two below.
        loss_low: lower end of the 95 % bootstrap interval of `loss`.
        loss_high: its upper end.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None
    num_windows: int
    seq_length: int
    stride: int
    loss_stderr: float | None
    loss_low: float | None
    loss_high: float | None


@dataclass(frozen=True, eq=False)
class ScoredWindows:
    """The loss of a model on each window of a stream.

    Attributes:
        sums: Σ loss in nats, float64 `[windows]`.
        counts: tokens scored, float64 `[windows]`.
        seq_length: tokens of context and target that the model sees at most.
        stride: tokens from one window to the next.
    """

    sums: np.ndarray
    counts: np.ndarray
    seq_length: int
    stride: int


class Window(NamedTuple):
    """One row of a forward pass: inputs are `tokens[start:end]`, scored are `tokens[first:end + 1]`."""

    start: int
    end: int
    first: int


def plan_windows(num_tokens: int, seq_length: int, stride: int) -> list[Window]:
    """Cut a stream into windows that score every token after the first exactly once.

    Consecutive windows share their border token: it is the last target of one and the first context of the next.

    Args:
        num_tokens: length of the stream.
        seq_length: inputs of a window.
        stride: distance between windows' starts, 1 … `seq_length`; shorter means more context and more work.
    """
    assert 1 <= stride <= seq_length
    windows = []
    start, first = 0, 1
    while first < num_tokens:
        end = min(start + seq_length, num_tokens - 1)
        windows.append(Window(start, end, first))
        start, first = start + stride, end + 1
    return windows


def score_windows(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seq_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    processes: Processes | None = None,
    residency: Residency | None = None,
) -> ScoredWindows:
    """Score a token stream window by window. Collective over the processes.

    Args:
        model: a causal LM in evaluation mode, whose logits `[batch, sequence, vocabulary]` predict the next token.
        tokens: integer `[tokens]`; the first is context only.
        seq_length: inputs of a window.
        stride: distance between windows' starts; None means `seq_length`, windows that do not overlap.
        batch_size: windows of a forward pass.
        processes: those that share the work; None is this one alone. Their number does not change the result.
        residency: where the model's weights are. Where a block is in memory at a time, all windows pass through it
            before the next one is there, with the same result; None has all of them in memory.

    Raises:
        DataError: fewer than two tokens, or a token id outside the model's vocabulary.
        ConfigError: a stride outside 1 … `seq_length`.
        CheckpointError: the model's loss is not a finite number.
    """
    stride = seq_length if stride is None else stride
    if not 1 <= stride <= seq_length:
        raise ConfigError(f"--stride {stride}: must be 1 to --seq-length {seq_length}, or tokens would go unscored")
    _check_tokens(tokens, model.config.get_text_config().vocab_size)
    windows = plan_windows(len(tokens), seq_length, stride)
    sums = _score(residency or Residency(model), tokens, windows, batch_size, processes or Processes())
    if not np.isfinite(sums).all():
        window = windows[int(np.flatnonzero(~np.isfinite(sums))[0])]
        where = f"tokens {window.first} to {window.end}"
        raise CheckpointError(f"the model's loss on {where} is non-finite; its weights or activations overflow")
    counts = np.array([window.end + 1 - window.first for window in windows], dtype=np.float64)
    return ScoredWindows(sums, counts, seq_length, stride)


def summary(windows: ScoredWindows, *, seed: int = 0, num_bytes: int | None = None) -> PerplexityResult:
    """The result of all windows together.

    Args:
        windows: windows of one stream.
        seed: seed of the bootstrap over windows.
        num_bytes: UTF-8 bytes of the scored text, for bits per byte.
    """
    total, num_tokens = float(windows.sums.sum()), windows.counts.sum()
    loss = float(total / num_tokens)
    stderr, low, high = _bootstrap(windows.sums, windows.counts, seed)
    return PerplexityResult(
        loss=loss,
        perplexity=exp(loss),
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
        num_tokens=int(num_tokens),
        num_bytes=num_bytes,
        num_windows=len(windows.sums),
        seq_length=windows.seq_length,
        stride=windows.stride,
        loss_stderr=stderr,
        loss_low=low,
        loss_high=high,
    )


def exp(loss: float) -> float:
    """`exp`, infinite where a float cannot hold it: a diverged model still gets its loss reported."""
    return float(np.exp(np.float64(loss))) if loss < math.log(np.finfo(np.float64).max) else math.inf


def _check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens to score; at least two are needed")
    outside = torch.nonzero((tokens < 0) | (tokens >= vocab_size)).flatten()
    if len(outside):
        position = int(outside[0])
        raise DataError(
            f"token id {int(tokens[position])} at position {position}, but the model's vocabulary has {vocab_size} "
            "entries; tokenise with this model's tokenizer"
        )


def _score(
    residency: Residency, tokens: torch.Tensor, windows: list[Window], batch_size: int, processes: Processes
) -> np.ndarray:
    """Σ loss of each window in nats, float64 `[windows]`.

    Only the last window can be shorter than the others; it runs alone, so nothing is ever padded.
    """
    num_full = sum(window.end - window.start == windows[0].end - windows[0].start for window in windows)
    batches = [windows[i : min(i + batch_size, num_full)] for i in range(0, num_full, batch_size)]
    if num_full < len(windows):
        batches.append(windows[num_full:])

    def work(own: Sequence[list[Window]]) -> list[list[float]]:
        inputs = [torch.stack([tokens[window.start : window.end] for window in batch]) for batch in own]
        logits = _logits if residency.is_whole else _logits_by_blocks
        # `map`, because a name for the logits of one batch would keep them while the next ones are made.
        return list(map(partial(_sum_losses, tokens), logits(residency, inputs, processes.no_progress), own))

    return np.array([loss for losses in processes.distribute(batches, work) for loss in losses], dtype=np.float64)


@torch.inference_mode()
def _logits(residency: Residency, inputs: list[torch.Tensor], no_progress: bool | None) -> Iterator[torch.Tensor]:
    """Logits of each batch of token ids, [B, T, V]."""
    for batch in tqdm(inputs, desc="perplexity", unit="batch", disable=no_progress):
        yield residency.model(input_ids=batch.to(residency.model.device), use_cache=False).logits


@torch.no_grad()
def _logits_by_blocks(
    residency: Residency, inputs: list[torch.Tensor], no_progress: bool | None
) -> Iterator[torch.Tensor]:
    """The same, all batches through a block before the next one."""
    if not inputs:
        return
    replay = Replay(residency.model, find_layers(residency.model))
    stream = ResidualStream(replay, residency, inputs)
    for layer in tqdm(range(len(replay.layers)), desc="perplexity", unit="block", disable=no_progress):
        stream.advance(layer)
    yield from stream.logits()


@torch.no_grad()
def _sum_losses(tokens: torch.Tensor, logits: torch.Tensor, batch: list[Window]) -> list[float]:
    """Σ loss of each window of a batch."""
    losses = []
    for row, window in zip(logits, batch, strict=True):  # row by row: a float32 copy of the batch's logits can be huge
        targets = tokens[window.first : window.end + 1].to(logits.device)
        scored = row[window.first - window.start - 1 :].float()
        losses.append(F.cross_entropy(scored, targets, reduction="none").double().sum())
    return torch.stack(losses).tolist()


def _bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float | None, float | None, float | None]:
    """Standard error and 95 % percentile interval of Σ sums ÷ Σ counts when windows are drawn with replacement."""
    num_windows = len(sums)
    if num_windows < 2:
        return None, None, None
    generator = np.random.default_rng(seed)
    losses = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn = generator.integers(num_windows, size=num_windows)
        losses[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(losses, [2.5, 97.5])
    return float(losses.std(ddof=1)), float(low), float(high)
