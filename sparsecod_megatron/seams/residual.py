"""What a remedy of the residual path is to the rest: how branches read its state and write to it.

    state   = expand(embedding)                      [..., columns · H]
    x       = read(state);  f = branch(norm(x));  state = join(f, state)      twice in a layer
    output  = final_norm(read(state))

All streams, or slots for earlier outputs, are packed side by side in one tensor, so recompute, pipeline messages and
checkpoints of inputs need to know its width alone. The same object builds the modules of a GPTModel and, from the file
of code that is exported, those of the `sparsecod` architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ResidualPath(Protocol):
    """Sub-layers are counted from 0, attention of layer l being 2l and its MLP 2l + 1; what reads last is 2L.

    Modules keep their parameters whole on every rank; a token's state needs no other token's and no other rank.

    Attributes:
        columns: vectors of H numbers in the state of a token.
        state_in_fp32: whether the state is fp32 whatever the model computes in.
    """

    columns: int
    state_in_fp32: bool

    def expansion(self) -> torch.nn.Module | None:
        """Embeddings [..., H] → the first state [..., columns · H]; None where they are it."""

    def read(self, sublayer: int) -> torch.nn.Module | None:
        """State [..., columns · H] → what the norm before a sub-layer gets [..., H]; None where the state is it."""

    def join(self, sublayer: int) -> torch.nn.Module:
        """(branch [..., H], state) → the next state."""

    def view(self, state: Tensor) -> Tensor:
        """The residual stream that statistics of layers are of, [..., columns · H] → [..., H]."""


def residual_path(mechanisms: Sequence[Any], model: Any) -> ResidualPath | None:
    """The path of the one mechanism that has its own; None for the plain one.

    Args:
        mechanisms: `seams.mechanism.Mechanism`s of a checked run.
        model: its `ModelConfig`.
    """
    paths = [path for mechanism in mechanisms if (path := mechanism.residual_path(model)) is not None]
    assert len(paths) <= 1, "a checked run has one residual path"
    return paths[0] if paths else None
