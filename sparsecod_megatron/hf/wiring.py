"""Which weights of a block feed which, to tell a feed-forward network from attention, convolution and recurrence.

Names and sizes cannot: an input and an output projection with a wide middle may hold neurons, a state-space model or a
convolution between them. In one pass over a few tokens every projection's output becomes a leaf of the gradient graph.
The gradient of one token's input to a later projection then says which projections feed it without another between,
and whether it reaches other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.hf.blocks import Layers, hidden_output, trial_tokens
from sparsecod_megatron.hf.expert_modules import is_projection
from sparsecod_megatron.hf.foreign import running


@dataclass
class Wire:
    """One projection's place in its block.

    Attributes:
        reads_stream: its input is made of the block's input without a projection between.
        writes_stream: the block's output is made of its output without a projection between.
        feeders: projections of the block that its input is made of, without another between → whether one token's
            input is made of several tokens' outputs.
    """

    reads_stream: bool = False
    writes_stream: bool = False
    feeders: dict[nn.Module, bool] = field(default_factory=dict)

    @property
    def is_down(self) -> bool:
        """Whether it ends a feed-forward network: what it adds for a token was made of that token alone."""
        return self.writes_stream and not self.reads_stream and bool(self.feeders) and not any(self.feeders.values())

    @property
    def is_mixer_output(self) -> bool:
        """Whether it ends what mixes tokens: attention, a convolution, a recurrence."""
        return self.writes_stream and not self.reads_stream and any(self.feeders.values())


Wiring = Mapping[nn.Module, Wire]
"""Wires of one block; projections that the pass did not call are absent."""


def trace_wiring(model: nn.Module, layers: Layers) -> list[Wiring]:
    """Run the model once on a few tokens.

    Args:
        model: a causal LM in evaluation mode.
        layers: layers of that model.

    Returns:
        One entry per block.

    Raises:
        ConversionError: the model cannot be run this way.
    """
    tracers = [_BlockTracer() for _ in layers.blocks]
    search = running(model, "the search for its feed-forward networks", "leave weights and activation out of --scores")
    with torch.enable_grad(), search, _traced(layers, tracers):
        model(input_ids=trial_tokens(model), use_cache=False)
    return [tracer.wires for tracer in tracers]


@contextmanager
def _traced(layers: Layers, tracers: list[_BlockTracer]) -> Iterator[None]:
    current: list[_BlockTracer] = []
    handles = []
    for block, tracer in zip(layers.blocks, tracers, strict=True):

        def enter(_block: nn.Module, args: Any, kwargs: Any, tracer: _BlockTracer = tracer) -> Any:
            current[:] = [tracer]
            return tracer.enter(args, kwargs)

        def leave(_block: nn.Module, _args: Any, output: Any) -> None:
            current.pop().leave(output)

        handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return current[-1].cut(module, args, kwargs, output) if current else None

    projections = {module for block in layers.blocks for module in block.modules() if is_projection(module)}
    handles += [module.register_forward_hook(cut, with_kwargs=True) for module in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockTracer:
    """Collects a block's projections as it runs, and reads their wires off the graph when it ends."""

    def __init__(self) -> None:
        self.wires: dict[nn.Module, Wire] = {}
        self._stream: Tensor | None = None
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # module, input, output as a leaf
        self._generator = torch.Generator().manual_seed(0)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin the graph at the block's input."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self._stream = hidden.detach().requires_grad_()
        passed = self._stream.clone()  # models may write into what they are given
        return ((passed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": passed})

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """End the graph at a projection's output and start a new one."""
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        made = hidden_output(output)
        assert made is not None
        leaf = made.detach().requires_grad_()
        self._calls.append((module, given, leaf))
        return (leaf.clone(), *output[1:]) if isinstance(output, tuple) else leaf.clone()

    def leave(self, output: Any) -> None:
        """Read the graph of the whole block."""
        after = hidden_output(output)
        assert after is not None and self._stream is not None
        self.wires = {module: Wire() for module, _, _ in self._calls}
        for module, gradient in self._gradients(after):  # of every token: not each of them reaches every expert
            if module is not None and gradient.any():
                self.wires[module].writes_stream = True
        for module, given, _ in self._calls:
            wire = self.wires[module]
            for feeder, gradient in self._gradients(given.reshape(-1, given.shape[-1])[-1:]):
                rows = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(-1)
                if not rows.any() or feeder is module:
                    continue
                if feeder is None:
                    wire.reads_stream = True
                    continue
                apart = len(rows) == given.numel() // given.shape[-1]  # rows of both are the same tokens
                mixes = bool(rows[:-1].any()) if apart else True
                wire.feeders[feeder] = wire.feeders.get(feeder, False) or mixes
        self._calls, self._stream = [], None

    def _gradients(self, value: Tensor) -> Iterator[tuple[nn.Module | None, Tensor]]:
        """(projection, or None for the block's input; gradient of a random sum of `value` by its output)."""
        if not value.requires_grad:
            return
        assert self._stream is not None
        weights = torch.randn(value.shape, generator=self._generator).to(value)
        leaves = [self._stream, *(leaf for _, _, leaf in self._calls)]
        gradients = torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True, allow_unused=True)
        for module, gradient in zip([None, *(module for module, _, _ in self._calls)], gradients, strict=True):
            if gradient is not None:
                yield module, gradient
