"""A model's attention through a function of ours, one block of queries at a time.

transformers lets a model call an attention function by name. While a `with` block runs ours takes the place of the
model's own: it computes the softmax rows of a bounded number of queries, lets a subclass look at or change them, and
forgets them. Masks, sliding windows, grouped keys, soft caps and sink logits arrive as arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sparsecod_megatron.analysis.branches import TOLERANCE, branch_error
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import hidden_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsecod_megatron.analysis.scores.context import Context

NAME = "sparsecod_rows"
MAX_SCORES = 1 << 24  # attention weights that exist at once: 64 MiB in fp32
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Call:
    """What a model gave its attention function.

    Attributes:
        query: `[batch, heads, queries, width]`, in the model's format.
        key: `[batch, key heads, keys, width]`, likewise.
        value: `[batch, key heads, keys, value width]`, likewise.
        mask: added to the scores, `[batch or 1, heads or 1, queries, keys]`, very low where a key is hidden.
        scaling: factor of the scores.
        softcap: bound of the scores before the mask, if any.
        sinks: per-head logit that takes mass without having a value, if any.
        position_bias: added to the scores, if any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None

    def sequences(self) -> Iterator[Call]:
        """The same for one sequence at a time."""
        for place in range(len(self.query)):
            one = slice(place, place + 1)
            mask = self.mask[one] if len(self.mask) > 1 else self.mask
            bias = self.position_bias
            if bias is not None and bias.dim() == 4 and len(bias) > 1:
                bias = bias[one]
            yield replace(
                self,
                query=self.query[one],
                key=self.key[one],
                value=self.value[one],
                mask=mask,
                position_bias=bias,
            )

    @property
    def groups(self) -> int:
        """Heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def first_position(self) -> int:
        """Position of the first query among the keys."""
        return self.key.shape[2] - self.query.shape[2]

    def visible(self, part: slice) -> Tensor:
        """Which keys the mask lets these queries see: bool, the mask's shape."""
        mask = self.mask[:, :, part]
        return mask > torch.finfo(mask.dtype).min / 2

    def scores(self, part: slice, keys: Tensor) -> Tensor:
        """Logits of these queries, capped and masked: `[batch, heads, queries, keys]`, fp32.

        Args:
            part: the queries.
            keys: `spread_over_heads` of the keys.
        """
        scores = self.query[:, :, part].float() @ keys.transpose(2, 3) * self.scaling
        if self.position_bias is not None:
            scores = scores + self.position_bias[..., part, : keys.shape[2]]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores + self.mask[:, :, part]

    def softmax(self, scores: Tensor) -> Tensor:
        """Weights of the keys; with a sink logit their sum is below one."""
        if self.sinks is None:
            return scores.softmax(-1)
        column = self.sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]

    def spread_over_heads(self, grouped: Tensor) -> Tensor:
        """Keys or values in fp32, one copy for each head: `[batch, heads, keys, ...]`."""
        return grouped.float().repeat_interleave(self.groups, 1)


class RowAttention:
    """An attention function that computes what the model's own does, row by row; subclasses see or change the rows.

    Args:
        blocks: the model's blocks, in order.
        max_scores: bound on the attention weights held at once (never less than one query's).
    """

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SCORES) -> None:
        self._layer_of = {id(module): layer for layer, block in enumerate(blocks) for module in block.modules()}
        self._max_scores = max_scores
        self._modules: dict[int, dict[nn.Module, None]] = {}  # in the order of their calls

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
        """Attend.

        Args:
            module: the attention module that calls.
            query: `[batch, heads, queries, width]`.
            key: `[batch, key heads, keys, width]`.
            value: `[batch, key heads, keys, value width]`.
            attention_mask: additive `[batch, 1 or heads, queries, keys]`; None is causal.
            scaling: factor of the scores; None is `1/√width`.
            dropout: not applied; what is measured is the model in evaluation mode.
            softcap: bound of the scores before the mask, if any.
            s_aux: per-head sink logit that takes mass without having a value, if any.
            position_bias: added to the scores, if any.
            sliding_window: keys a query sees, used only where no mask arrives.
            **kwargs: what the model passes to every attention function; none of it changes the weights.

        Returns:
            The output `[batch, queries, heads, value width]`, and None in place of the weights.
        """
        if attention_mask is None:
            attention_mask = _causal_mask(query.shape[2], key.shape[2], sliding_window, query.device)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask[..., : key.shape[2]]
        call = Call(query, key, value, mask, scaling, softcap, s_aux, position_bias)
        layer = self._layer_of.get(id(module))
        if layer is not None:
            self._modules.setdefault(layer, {})[module] = None
        output = self.attend(layer, module, call)
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    def attend(self, layer: int | None, module: nn.Module, call: Call) -> Tensor:
        """The output `[batch, heads, queries, value width]`, fp32, made of one sequence at a time.

        Args:
            layer: index of the block; None outside of all.
            module: the attention that calls.
            call: its arguments.
        """
        outputs = []
        for one in call.sequences():
            keys, values = one.spread_over_heads(one.key), one.spread_over_heads(one.value)
            rows = [self.rows(layer, module, one, part, one.scores(part, keys), values) for part in self.parts(one)]
            outputs.append(torch.cat(rows, 2))
        return torch.cat(outputs)

    def rows(
        self, layer: int | None, module: nn.Module, call: Call, part: slice, scores: Tensor, values: Tensor
    ) -> Tensor:
        """The output of some queries of one sequence, `[1, heads, queries, value width]`.

        Args:
            layer: index of the block; None outside of all.
            module: the attention that calls.
            call: its arguments for this sequence.
            part: the queries; parts of a sequence come in order.
            scores: `[1, heads, queries, keys]`, capped and masked.
            values: `[1, heads, keys, value width]`.
        """
        return call.softmax(scores) @ values

    def parts(self, call: Call) -> Iterator[slice]:
        """All queries in parts whose rows are no more than may be held."""
        batch, heads, queries, _ = call.query.shape
        rows = max(1, self._max_scores // (batch * heads * call.key.shape[2]))
        for start in range(0, queries, rows):
            yield slice(start, min(start + rows, queries))

    def modules(self, layer: int) -> list[nn.Module]:
        """The attentions of a block that have been called."""
        return list(self._modules.get(layer, ()))

    @property
    def layers(self) -> list[int]:
        """Blocks whose attentions have been called."""
        return sorted(self._modules)


@contextmanager
def attending(model: PreTrainedModel, attention: RowAttention, advice: str) -> Iterator[None]:
    """Let the model attend through `attention`; its own attention is back afterwards.

    Args:
        model: the model.
        attention: of its blocks.
        advice: what to do where that is impossible.

    Raises:
        ConversionError: the model's attention is not exchangeable.
    """
    AttentionMaskInterface.register(NAME, eager_mask)
    AttentionInterface.register(NAME, attention)  # for all models, also those with an interface of their own
    previous = model.config._attn_implementation
    try:
        _set_attention(model, NAME, advice)
        yield
    finally:
        _set_attention(model, previous, advice)
        AttentionInterface.register(NAME, _nothing)


def check_same(context: Context, tokens: Tensor, labels: Tensor, attention: RowAttention, advice: str) -> None:
    """Every attention must give with our function what it gives with its own, for the same input of its block.

    Not the block or the loss: what follows attention may hide a difference, and a router makes one of rounding.

    Args:
        context: the model and the sample.
        tokens: `[batch, queries]` a micro-batch's inputs.
        labels: `[batch, queries]` its labels.
        attention: a fresh one, which changes nothing; it holds the attentions that were called afterwards.
        advice: what to do where the model is refused.

    Raises:
        ConversionError: no attention is called, or one does more than its arguments say.
    """
    replay = context.replay
    with attending(context.model, attention, advice):
        calls = replay.trace(tokens, labels)  # with the masks that ours reads
    if not attention.layers:
        raise ConversionError(f"{type(context.model).__name__}: no block calls an attention; {advice}")
    modules = {layer: attention.modules(layer) for layer in attention.layers}
    with _outputs([module for found in modules.values() for module in found]) as own:
        hidden = replay.trace(tokens, labels).hidden
    for layer, found in modules.items():
        with attending(context.model, attention, advice), _outputs(found) as ours, torch.no_grad():
            replay.run_block(calls, layer, hidden[layer])
        for module in found:
            error = branch_error(torch.zeros_like(own[module]), own[module], ours[module])
            if not error <= TOLERANCE[context.dtype]:
                raise ConversionError(
                    f"{type(module).__name__} of block {layer}: recomputed, it gives other outputs (relative "
                    f"difference {error:.1e}), so it does more than scores, mask and softmax; {advice}"
                )


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What the modules put out while the `with` block runs, by module."""
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        after = hidden_output(output)
        assert after is not None
        found[module] = after

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _set_attention(model: PreTrainedModel, name: str, advice: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise _refusal(model, advice) from error
    if model.config._attn_implementation != name:
        raise _refusal(model, advice)


def _nothing(*_: object, **__: object) -> tuple[Tensor, None]:
    """In the function's place outside of `attending`: transformers offers no way to take a function back."""
    raise AssertionError("attention of a model that is not being measured")


def _refusal(model: PreTrainedModel, advice: str) -> ConversionError:
    return ConversionError(
        f"{type(model).__name__} does not call its attention through transformers' attention interface, so its rows "
        f"cannot be seen; {advice}"
    )


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    hidden = (keys > queries) | (keys <= queries - (window or num_keys))
    return torch.zeros(1, 1, num_queries, num_keys, device=device).masked_fill(hidden, HIDDEN)
