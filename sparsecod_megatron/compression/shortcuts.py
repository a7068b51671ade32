"""Residual additions of a pre-norm block that change the basis of the stream: x + branch(norm(x)) becomes x·S + ….

A block adds x itself, so its class has no place for S. What the branch hands back is given x·(S - 1) in addition, which
a hook on the norm, where x comes by, and one on the branch do together, whatever else the block's class does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsecod_megatron.hf.blocks import hidden_output

NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""A block's branches, and the norm before each."""

Join = Callable[[Tensor, Tensor], Tensor]
"""What a branch hands back instead, from x and what it handed back, both `[B, T, d]`."""


class Shortcut(nn.Module):
    """x → x·(S - 1), with a square matrix S that takes the stream from one basis to the next.

    Args:
        width: d of the stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` → `[..., d]`."""
        return x @ self.weight

    def join(self, x: Tensor, output: Tensor) -> Tensor:
        """What a branch hands back, with this added."""
        return output + self(x)


def attach(block: nn.Module, branch: str, shortcut: Shortcut) -> None:
    """Make the addition of a block's branch change the basis.

    Args:
        block: pre-norm, with the names of Llama.
        branch: of `NORMS`.
        shortcut: becomes a module of the block.
    """
    block.add_module(f"{branch}_shortcut", shortcut)
    bridge(block, branch, shortcut.join)


def bridge(block: nn.Module, branch: str, join: Join) -> list[RemovableHandle]:
    """Let a branch hand back something else, made of what is added to it too.

    Args:
        block: pre-norm, with the names of Llama.
        branch: of `NORMS`.
        join: makes it.

    Returns:
        Hooks, which can be removed.
    """
    bridged = _Bridge(join)
    return [
        block.get_submodule(NORMS[branch]).register_forward_pre_hook(bridged.keep),
        block.get_submodule(branch).register_forward_hook(bridged.answer),
    ]


class _Bridge:
    """Carries x from a norm to the branch behind it, for the length of one call; an object, so that models copy."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._x: Tensor | None = None

    def keep(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x = args[0]

    def answer(self, _branch: nn.Module, _args: Any, output: Any) -> Any:
        found, x = hidden_output(output), self._x
        assert found is not None and x is not None, "a block's norm runs before its branch"
        self._x = None
        joined = self._join(x, found)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined
