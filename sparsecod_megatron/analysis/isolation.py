"""One block as a function of one token at a time, the other tokens' keys and values held fixed.

A block mixes tokens only in its attention. Here attention takes the keys and values of all tokens from a recorded pass
and lets gradients flow only into a token's own. All sampled tokens then pass through the block at once, each depending
on its own input alone, so a single backward pass gives one row of every token's Jacobian.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sparsecod_megatron.analysis.branches import TOLERANCE, branch_error, token_errors
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import hidden_output
from sparsecod_megatron.hf.calls import Call, Replay, Trace
from sparsecod_megatron.hf.foreign import running
from sparsecod_megatron.hf.residual_state import ResidualState

ATTENTION = "sparsecod_isolated"
_ADVICE = "leave jacobian out of --scores"
_RARE = 0.5
"""Share of tokens that differ below which the block's function is not the reason: mixing reaches nearly every token."""


@dataclass
class _Record:
    """What an attention module was given for whole sequences.

    Attributes:
        keys: [B, H, T, head]; `values` likewise.
        mask: [B or 1, H or 1, T, T], added to the scores.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


@dataclass
class IsolatedBlock:
    """One block on chosen tokens of one micro-batch.

    Attributes:
        block: the module.
        call: what the model calls it with.
        view: how its state is to be seen.
        state: its input.
        hidden: [B, T, d] what its attention reads: of a plain block its input.
        after: [B, T, d] that with what it writes in the model added: of a plain block its output.
    """

    block: nn.Module
    call: Call
    view: ResidualState
    state: Tensor
    hidden: Tensor
    after: Tensor
    _records: dict[nn.Module, _Record] = field(default_factory=dict)
    _chosen: tuple[Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """The block as a map of what it reads, for tokens that stand at `positions` of sequences `rows`.

        Args:
            tokens: [copies · b, p, d] in place of the model's own; `copies` variants of the same places.
            rows: [b] sequences of the micro-batch.
            positions: [b, p] places of the tokens in each.

        Returns:
            [copies · b, p, d]; entry [c·b + i, j] depends on `tokens[c·b + i, j]` alone.

        Raises:
            ConversionError: the block's code does not take tokens apart from the others.
        """
        copies = len(tokens) // len(rows)
        args = tuple(_at(value, rows, positions, copies, self.hidden) for value in self.call.args)
        kwargs = {key: _at(value, rows, positions, copies, self.hidden) for key, value in self.call.kwargs.items()}
        state = self.state[rows[:, None], positions].repeat(copies, 1, 1)

        def run(hidden: Tensor) -> Tensor:
            with running(self.block, "a pass of chosen tokens, apart from the others,", _ADVICE):
                after = hidden_output(self.block(hidden, *args, **kwargs))
            assert after is not None
            return after

        self._chosen = (rows, positions)
        try:
            return self.view.mapped(self.block, run, tokens, state)
        finally:
            self._chosen = None

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: [batch, heads, tokens, head] each → [batch, tokens, heads, head]."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._chosen is None:
            record = _Record(key, value, _additive(attention_mask, query))
            self._records[module] = record
            weights = _soften(query @ key.transpose(-1, -2) * scale, record.mask, softcap, s_aux)
            return (weights @ value).transpose(1, 2).contiguous(), None
        record, (rows, positions) = self._records[module], self._chosen
        copies = len(query) // len(rows)
        fixed_keys, fixed_values = record.keys[rows], record.values[rows]
        mask = record.mask.expand(len(self.hidden), -1, -1, -1)[rows[:, None], :, positions]  # [b, p, 1 or H, T]
        query, key, value = (_fold(part, copies) for part in (query, key, value))
        places = positions.repeat(1, copies)[:, None, :, None].expand(-1, query.shape[1], -1, -1)
        # A token's own key and value equal the fixed ones at its place: their difference is zero, its gradient is not.
        own_key = key - fixed_keys.gather(2, places.expand(-1, -1, -1, key.shape[-1]))
        own_value = value - fixed_values.gather(2, places.expand(-1, -1, -1, value.shape[-1]))
        scores = query @ fixed_keys.transpose(-1, -2)
        scores = scores.scatter_add(3, places, (query * own_key).sum(dim=-1, keepdim=True)) * scale
        weights = _soften(scores, mask.transpose(1, 2).repeat(1, 1, copies, 1), softcap, s_aux)
        mixed = weights @ fixed_values + weights.gather(3, places) * own_value
        return _unfold(mixed, copies).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def check(self, rows: Tensor, positions: Tensor) -> None:
        """Record the fixed keys and values, and refuse a block that is not itself when taken apart.

        Raises:
            ConversionError: the block mixes tokens in a way that this file cannot hold fixed.
        """
        self._records.clear()
        with running(self.block, "a pass with attention exchanged", _ADVICE):
            self.block(self.state, *self.call.args, **self.call.kwargs)
        kind = type(self.block).__name__
        if not self._records:
            raise ConversionError(
                f"{kind}: its attention is not one of transformers' exchangeable functions, so tokens cannot be taken "
                f"apart; {_ADVICE}"
            )
        places = (rows[:, None], positions)
        outputs = self.hidden[places], self.after[places], self(self.hidden[places], rows, positions)
        error, tolerance = branch_error(*outputs), TOLERANCE[self.hidden.dtype]
        if error <= tolerance:
            return
        differ = ~(token_errors(*outputs) <= tolerance)
        given = f"taken apart by tokens it gives other outputs (relative difference {error:.1e})"
        if differ.double().mean() < _RARE:
            raise ConversionError(
                f"{kind}: {given} for {int(differ.sum())} of {differ.numel()} tokens, which rounding alone sends "
                "another way, as it can a router's choice of experts; use --dtype float32, another --seed, or "
                f"{_ADVICE}"
            )
        raise ConversionError(f"{kind}: {given}, so it mixes tokens outside its attention; {_ADVICE}")


@contextmanager
def isolated(replay: Replay, trace: Trace, layer: int) -> Iterator[IsolatedBlock]:
    """Let a block's attention be the one above while the `with` block runs.

    Args:
        replay: of the model.
        trace: the micro-batch.
        layer: index of the block.
    """
    model, layers = replay.model, replay.layers
    hidden, after = replay.seen(trace, layer)
    apart = IsolatedBlock(layers.blocks[layer], trace.calls[layer], layers.state, trace.hidden[layer], hidden, after)
    AttentionInterface.register(ATTENTION, apart.attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        yield apart
    finally:
        model.set_attn_implementation(before)


def _at(value: Any, rows: Tensor, positions: Tensor, copies: int, hidden: Tensor) -> Any:
    """An argument of the whole micro-batch, cut to chosen tokens: what has axes [B or 1, T, ...] is gathered."""
    if isinstance(value, tuple):
        return tuple(_at(item, rows, positions, copies, hidden) for item in value)
    batch, length = hidden.shape[:2]
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length or value.shape[0] not in (1, batch):
        return value
    cut = value.expand(batch, *value.shape[1:])[rows[:, None], positions]
    return cut.repeat(copies, *(1,) * (cut.dim() - 1))


def _fold(heads: Tensor, copies: int) -> Tensor:
    """[copies · b, H, p, e] → [b, H, copies · p, e]: all variants of a sequence attend to its one set of keys."""
    _, num_heads, tokens, size = heads.shape
    apart = heads.reshape(copies, -1, num_heads, tokens, size)
    return apart.permute(1, 2, 0, 3, 4).reshape(-1, num_heads, copies * tokens, size)


def _unfold(heads: Tensor, copies: int) -> Tensor:
    """The way back from `_fold`."""
    batch, num_heads, tokens, size = heads.shape
    apart = heads.reshape(batch, num_heads, copies, tokens // copies, size)
    return apart.permute(2, 0, 1, 3, 4).reshape(copies * batch, num_heads, tokens // copies, size)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """What is added to scores [B, H, T, T]: a mask of either kind, or none at all, which means causal."""
    length, lowest = query.shape[2], torch.finfo(query.dtype).min
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return mask[..., :length]


def _soften(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax over keys; `sinks` [H] are logits of a key without a value, which takes mass."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    precise, masked = torch.promote_types(scores.dtype, torch.float32), scores + mask
    if sinks is None:
        return torch.softmax(masked, dim=-1, dtype=precise).to(scores.dtype)
    column = sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([masked, column], dim=-1), dim=-1, dtype=precise)[..., :-1].to(scores.dtype)
