"""Attention statistics of a model, one block of queries at a time.

transformers lets a model call an attention function by name. For the length of one pass ours takes the place of the
model's own: it computes the softmax rows for a bounded number of queries, adds up their statistics, multiplies by the
values and forgets them. Masks, sliding windows, grouped keys, soft caps and sink logits arrive as arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sparsecod_megatron.analysis.sparsity.attention_rows import STATISTICS, row_statistics
from sparsecod_megatron.errors import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "sparsecod_row_statistics"
MAX_SCORES = 1 << 24  # attention weights that exist at once: 64 MiB in fp32


class RowRecorder:
    """An attention function that records the mean row statistics of every layer, sequence and head.

    Args:
        blocks: the model's blocks, in order.
        max_scores: bound on the attention weights held at once (never less than one query's).
    """

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SCORES) -> None:
        self._layer_of = {id(module): layer for layer, block in enumerate(blocks) for module in block.modules()}
        self._max_scores = max_scores
        self._rows: dict[int, dict[nn.Module, list[Tensor]]] = {}  # a block may have several attentions

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attend as the model would, and record.

        Args:
            module: the attention module that calls.
            query: `[batch, heads, queries, width]`.
            key: `[batch, key heads, keys, width]`.
            value: `[batch, key heads, keys, value width]`.
            attention_mask: additive `[batch, 1 or heads, queries, keys]`; None is causal.
            scaling: factor of the scores; None is `1/√width`.
            dropout: not applied; statistics are of the model in evaluation mode.
            softcap: bound of the scores before the mask, if any.
            s_aux: per-head sink logit that takes mass without having a value, if any.
            position_bias: added to the scores, if any.
            sliding_window: keys a query sees, used only where no mask arrives.
            **kwargs: what the model passes to every attention function; none of it changes the weights.

        Returns:
            The output `[batch, queries, heads, value width]`, and None in place of the weights.
        """
        heads, num_queries = query.shape[1:3]
        if attention_mask is None:
            attention_mask = _causal_mask(num_queries, key.shape[2], sliding_window, query.device)
        groups = heads // key.shape[1]
        key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = torch.empty(*query.shape[:3], value.shape[-1], device=query.device)
        total = torch.zeros(*query.shape[:2], len(STATISTICS), device=query.device)
        rows = max(1, self._max_scores // (query.shape[0] * heads * key.shape[2]))
        for start in range(0, num_queries, rows):
            part = slice(start, start + rows)
            scores = query[:, :, part].float() @ key.transpose(2, 3) * scaling
            if position_bias is not None:
                scores = scores + position_bias[..., part, : key.shape[2]]
            mask = attention_mask[:, :, part, : key.shape[2]]
            weights = _softmax(scores, mask, softcap, s_aux)
            visible = (mask > torch.finfo(mask.dtype).min / 2).sum(-1)
            output[:, :, part] = weights @ value
            total += row_statistics(weights, visible, start, num_queries).sum(2)
        if (layer := self._layer_of.get(id(module))) is not None:
            self._rows.setdefault(layer, {}).setdefault(module, []).append((total / num_queries).cpu())
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    def modules(self, layer: int) -> list[nn.Module]:
        """The attentions of a block that have been called."""
        return list(self._rows[layer])

    def layers(self) -> dict[int, Tensor]:
        """Means over each sequence's queries, by layer: `[sequences, heads, statistics]`, heads of all attentions."""
        return {
            layer: torch.cat([torch.cat(rows) for rows in modules.values()], dim=1)
            for layer, modules in sorted(self._rows.items())
        }


@contextmanager
def recording(model: PreTrainedModel, recorder: RowRecorder) -> Iterator[None]:
    """Let the model attend through `recorder`; its own attention is back afterwards.

    Raises:
        ConversionError: the model's attention is not exchangeable.
    """
    AttentionMaskInterface.register(_NAME, eager_mask)
    AttentionInterface.register(_NAME, recorder)  # for all models, also those with an interface of their own
    previous = model.config._attn_implementation
    try:
        _set_attention(model, _NAME)
        yield
    finally:
        _set_attention(model, previous)
        AttentionInterface.register(_NAME, _no_recorder)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise _refusal(model) from error
    if model.config._attn_implementation != name:
        raise _refusal(model)


def _no_recorder(*_: object, **__: object) -> tuple[Tensor, None]:
    """In the recorder's place outside of `recording`: transformers offers no way to take a function back."""
    raise AssertionError("attention of a model that is not being recorded")


def _refusal(model: PreTrainedModel) -> ConversionError:
    return ConversionError(
        f"{type(model).__name__} does not call its attention through transformers' attention interface, so its rows "
        "cannot be seen; leave attention out of --scores"
    )


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    hidden = (keys > queries) | (keys <= queries - (window or num_keys))
    return torch.zeros(1, 1, num_queries, num_keys, device=device).masked_fill(hidden, torch.finfo(torch.float32).min)


def _softmax(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
