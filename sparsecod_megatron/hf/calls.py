"""One forward pass with everything an intervention needs kept, and the ways to resume from the middle of it.

A pass keeps the residual stream at every depth and the arguments each block was called with (masks, rotary angles).
An intervention at block `s` then starts from `h_s` and runs only what comes after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecod_megatron.hf.blocks import Layers, hidden_input, hidden_output, swapped
from sparsecod_megatron.hf.foreign import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADVICE = "its blocks cannot be run by themselves, as depth scores and pruning by calibration do; use others"


@dataclass(frozen=True)
class Call:
    """How the model called a block: its arguments without the hidden states, and what it answered besides them.

    Attributes:
        args: positional ones after the hidden states.
        kwargs: named ones but the hidden states.
        rest: what follows the hidden states in the block's tuple, which the model may unpack; None without a tuple.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: tuple[Any, ...] | None


@dataclass(frozen=True)
class Trace:
    """One micro-batch in the unchanged model.

    Attributes:
        tokens: [B, T] inputs, on the model's device.
        labels: [B, T] the next tokens.
        hidden: [L + 1] of [B, T, d]: `h_0 … h_L`, or `h_0` alone where no more was asked for.
        calls: [L] what each block was called with.
    """

    tokens: Tensor
    labels: Tensor
    hidden: list[Tensor]
    calls: list[Call]


class Replay:
    """Runs a model whole or in parts.

    Args:
        model: in evaluation mode.
        layers: layers of that model.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers) -> None:
        self.model = model
        self.layers = layers

    @torch.no_grad()
    def trace(self, tokens: Tensor, labels: Tensor, *, only_first: bool = False) -> Trace:
        """Run the model once, up to its last block: not every score needs the head.

        Args:
            tokens: [B, T] inputs.
            labels: [B, T] the next tokens.
            only_first: keep `h_0` alone, whose memory does not grow with the number of blocks.
        """
        tokens, labels = tokens.to(self.model.device), labels.to(self.model.device)
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = hidden_input(args, kwargs), hidden_output(output)
            assert before is not None and after is not None
            if not hidden:
                hidden.append(before)
            if not only_first:
                hidden.append(after)
            calls.append(_call(args, kwargs, output[1:] if isinstance(output, tuple) else None))
            if len(calls) == len(self.layers):
                raise _AllBlocksRan

        hooks = [block.register_forward_hook(note, with_kwargs=True) for block in self.layers.blocks]
        try:
            with running(self.model, "a pass over the sample", _ADVICE), contextlib.suppress(_AllBlocksRan):
                self.model(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(tokens, labels, hidden, calls)

    @torch.no_grad()
    def skim(self, tokens: Tensor, like: Trace) -> Trace:
        """What the blocks are called with, without running one: each hands on what it is given.

        The arguments are those of a whole pass where they do not depend on what blocks compute; `same_calls` tells.

        Args:
            tokens: [B, T] inputs.
            like: a whole pass over other tokens, which says what follows the hidden states in a block's answer.

        Returns:
            A trace whose only hidden states are `h_0`, and whose labels are the tokens.
        """
        tokens, calls, hidden = tokens.to(self.model.device), list[Call](), list[Tensor]()
        passing = {
            layer: _Passing(block, like.calls[layer].rest, hidden, calls, len(self.layers))
            for layer, block in enumerate(self.layers.blocks)
        }
        with (
            swapped(self.layers.blocks, passing),
            running(self.model, "a pass over the sample", _ADVICE),
            contextlib.suppress(_AllBlocksRan),
        ):
            self.model(input_ids=tokens, use_cache=False)
        return Trace(tokens, tokens, hidden[:1], calls)

    def losses(self, trace: Trace) -> Tensor:
        """[B] cross entropy of the unchanged model, mean over tokens in nats, float64 on the CPU."""
        return self.losses_after(trace, (), trace.hidden[-1])

    def run_block(self, trace: Trace, layer: int, hidden: Tensor) -> Tensor:
        """Block `layer` with its own mask and angles on hidden states [B, T, d]."""
        call = trace.calls[layer]
        block = self.layers.blocks[layer]
        with running(block, "a pass of one block on hidden states", _ADVICE):
            output = block(hidden, *call.args, **call.kwargs)
        after = hidden_output(output)
        assert after is not None
        return after

    def step(self, trace: Trace, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What `run_block` gives, and what the block writes of it, [B, T, d]."""
        state = self.layers.state
        with state.watching(self.layers.blocks[layer]) as branches:
            after = self.run_block(trace, layer, hidden)
        return after, state.written(hidden, after, branches)

    @torch.no_grad()
    def seen(self, trace: Trace, layer: int) -> tuple[Tensor, Tensor]:
        """What a block reads, and that with what it writes added: of a plain block its input and output; [B, T, d]."""
        state, before = self.layers.state, trace.hidden[layer]
        if state.columns == 1:
            return before, trace.hidden[layer + 1]
        read = state.read(self.layers.blocks[layer], before)
        return read, read + self.step(trace, layer, before)[1]

    def mapped(self, trace: Trace, layer: int, read: Tensor) -> Tensor:
        """The second of `seen` as a function of the first, which gradients reach."""
        block, state = self.layers.blocks[layer], self.layers.state
        return state.mapped(block, lambda hidden: self.run_block(trace, layer, hidden), read, trace.hidden[layer])

    def run_blocks(self, trace: Trace, order: Sequence[int], hidden: Tensor) -> Iterator[Tensor]:
        """Run blocks in the given order, yielding what each leaves, [B, T, d]."""
        for layer in order:
            hidden = self.run_block(trace, layer, hidden)
            yield hidden

    def after(self, trace: Trace, order: Sequence[int], hidden: Tensor) -> Tensor:
        """What the last of these blocks leaves, or `hidden` itself where there is none, [B, T, d]."""
        for layer in order:
            hidden = self.run_block(trace, layer, hidden)
        return hidden

    @torch.no_grad()
    def losses_after(self, trace: Trace, order: Sequence[int], hidden: Tensor) -> Tensor:
        """Cross entropy when only the blocks in `order` are left.

        Args:
            trace: the micro-batch.
            order: blocks still to run, in order.
            hidden: [B, T, d] what goes into the first of them.

        Returns:
            [B] mean over tokens in nats, float64 on the CPU.
        """
        return sequence_losses(self.logits(trace, self.after(trace, order, hidden)), trace.labels)

    def logits(self, trace: Trace, hidden: Tensor) -> Tensor:
        """What the model predicts if `hidden` [B, T, d] is the last block's output: [B, T, V]; gradients reach it.

        The model itself runs, its blocks replaced by ones that answer with `hidden`, so whatever it does after them
        (norm, scale, cap) is done here too.
        """
        answers = {
            layer: _Answer(block, hidden, trace.calls[layer].rest) for layer, block in enumerate(self.layers.blocks)
        }
        doing = "what the model does after its blocks"
        with swapped(self.layers.blocks, answers), running(self.model, doing, _ADVICE):
            logits: Tensor = self.model(input_ids=trace.tokens, use_cache=False).logits
        return logits


class _AllBlocksRan(Exception):
    """Ends a forward pass before the head."""


class _StandIn(nn.Module):
    """Takes a block's place, and has its attributes."""

    def __init__(self, block: nn.Module, **own: Any) -> None:
        super().__init__()
        self.__dict__.update(_block=block, **own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class _Answer(_StandIn):
    """Answers every call with given hidden states."""

    def __init__(self, block: nn.Module, hidden: Tensor, rest: tuple[Any, ...] | None) -> None:
        super().__init__(block, _answer=hidden if rest is None else (hidden, *rest))

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["_answer"]


class _Passing(_StandIn):
    """Notes what it is called with and answers with the hidden states it was given; the last one ends the pass."""

    def __init__(
        self,
        block: nn.Module,
        rest: tuple[Any, ...] | None,
        hidden: list[Tensor],
        calls: list[Call],
        num_blocks: int,
    ) -> None:
        super().__init__(block, _rest=rest, _hidden=hidden, _calls=calls, _num_blocks=num_blocks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        given, rest = hidden_input(args, kwargs), own["_rest"]
        assert given is not None
        own["_hidden"].append(given)
        own["_calls"].append(_call(args, kwargs, rest))
        if len(own["_calls"]) == own["_num_blocks"]:
            raise _AllBlocksRan
        return given if rest is None else (given, *rest)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], rest: tuple[Any, ...] | None) -> Call:
    named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return Call(args[1:], named, rest)


def same_calls(first: Sequence[Call], second: Sequence[Call]) -> bool:
    """Whether blocks were called with equal tensors and values, hidden states aside."""
    return len(first) == len(second) and all(
        _same((one.args, one.kwargs, one.rest), (other.args, other.kwargs, other.rest))
        for one, other in zip(first, second, strict=True)
    )


def _same(first: Any, second: Any) -> bool:
    """Equal tensors, sequences and mappings of such, or values; objects of other kinds are taken to be alike."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first is second or (first.shape == second.shape and torch.equal(first, second))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return not isinstance(first, bool | int | float | str) or first == second


def sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T, V] and [B, T] → [B] mean cross entropy in nats, float64 on the CPU."""
    return token_losses(logits, labels).mean(dim=1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T, V] and [B, T] → [B, T] cross entropy in nats, float64 on the CPU.

    Row by row: a float32 copy of a whole batch's logits can be huge.
    """
    rows = [
        F.cross_entropy(row.float(), target, reduction="none").double()
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows).cpu()
