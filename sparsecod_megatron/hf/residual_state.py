"""What a block reads, writes and leaves of the residual stream, where its state is more than that stream.

A plain block reads h and writes Δ = h' − h. The state of the `sparsecod` architecture may hold several streams, or
slots for earlier outputs, side by side (a mechanism's residual path). Differences of such states hold the mixing of
streams too, and a map of one has n² times the numbers. So a score takes what the block's attention reads
[B, T, d], the sum of what both branches hand to their joins [B, T, d], and one view of the state. For a plain
model all are the stream's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ResidualState:
    """The plain residual stream, [B, T, d]."""

    columns = 1
    """Vectors of d numbers in the state of a token."""

    def view(self, state: Tensor) -> Tensor:
        """The residual stream in a state."""
        return state

    def read(self, block: nn.Module, state: Tensor) -> Tensor:
        """What a block's first branch reads."""
        return state

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[list[Tensor]]:
        """What a block's branches hand on while it runs inside; nothing, where the states say it."""
        yield []

    def written(self, before: Tensor, after: Tensor, branches: list[Tensor]) -> Tensor:
        """What a block adds: its input, its output and what `watching` gave."""
        return after - before

    def mapped(self, block: nn.Module, run: Callable[[Tensor], Tensor], read: Tensor, state: Tensor) -> Tensor:
        """A block as a map of what its first branch reads: that, with what the block writes added.

        Args:
            block: the module.
            run: calls it on a state.
            read: [B, T, d], which gradients reach.
            state: which it is read from.
        """
        return run(read)

    def replaced(self, block: nn.Module, state: Tensor, mapped: Tensor) -> Tensor:
        """The state behind a block of which only this is known: what it reads plus what it writes."""
        return mapped

    @contextmanager
    def traded(self, one: nn.Module, other: nn.Module) -> Iterator[None]:
        """While two blocks stand in each other's places inside."""
        yield


class PackedState(ResidualState):
    """Columns side by side, [B, T, columns · d].

    Args:
        path: of the blocks (seams/residual.py).
    """

    def __init__(self, path: Any) -> None:
        self.path, self.columns = path, path.columns

    def view(self, state: Tensor) -> Tensor:
        """The path's view, [B, T, d]."""
        view: Tensor = self.path.view(state)
        return view

    def read(self, block: Any, state: Tensor) -> Tensor:
        """What attention reads, [B, T, d]."""
        read: Tensor = block.attention_residual(state)
        return read

    @contextmanager
    def watching(self, block: Any) -> Iterator[list[Tensor]]:
        """What attention and MLP hand to their joins."""
        branches: list[Tensor] = []
        hooks = [
            residual.write.register_forward_pre_hook(lambda _module, inputs: branches.append(inputs[0]))
            for residual in (block.attention_residual, block.mlp_residual)
        ]
        try:
            yield branches
        finally:
            for hook in hooks:
                hook.remove()

    def written(self, before: Tensor, after: Tensor, branches: list[Tensor]) -> Tensor:
        """Both branches' sum, whatever joins make of it."""
        attention, mlp = branches
        return attention + mlp

    def mapped(self, block: Any, run: Callable[[Tensor], Tensor], read: Tensor, state: Tensor) -> Tensor:
        """What attention reads, with both branches added.

        The state is held fixed, but where attention's read moves, and where it writes, the MLP's read moves as much, as
        it does in a plain block. So the derivative is (I + J_MLP) (I + J_attention), of the branches at what they read.
        """

        def moved(x: Tensor) -> Tensor:
            return x - x.detach()

        with self.watching(block) as branches:
            hooks = [
                block.attention_residual.register_forward_hook(lambda *_: read),
                block.mlp_residual.register_forward_hook(
                    lambda _module, _inputs, own: own.detach() + (moved(read) + moved(branches[0]))
                ),
            ]
            try:
                run(state)
            finally:
                for hook in hooks:
                    hook.remove()
            return read + self.written(state, state, branches)

    def replaced(self, block: Any, state: Tensor, mapped: Tensor) -> Tensor:
        """The MLP's join of what is written, behind attention's join of nothing: streams are mixed as ever."""
        written = mapped - self.read(block, state)
        after: Tensor = block.mlp_residual.join(
            written, block.attention_residual.join(torch.zeros_like(written), state)
        )
        return after

    @contextmanager
    def traded(self, one: Any, other: Any) -> Iterator[None]:
        """Branches trade places; reads and joins stay, as slots belong to a place in the model."""
        for name in ("attention_residual", "mlp_residual"):
            _trade(one, other, name)
        try:
            yield
        finally:
            for name in ("attention_residual", "mlp_residual"):
                _trade(one, other, name)


def _trade(one: nn.Module, other: nn.Module, name: str) -> None:
    kept = getattr(one, name)
    setattr(one, name, getattr(other, name))
    setattr(other, name, kept)


def residual_state(block: nn.Module) -> ResidualState:
    """How a block's state is to be seen."""
    path = getattr(block, "path", None)
    return PackedState(path) if getattr(path, "columns", 1) > 1 else ResidualState()
