"""DenseFormer: what goes into a layer is a weighted sum of the outputs of all layers before it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams_sparsecod import FirstColumn, StreamPath, extension


class Path(StreamPath):
    """The current stream, and the outputs of the layers before it (0: the embedding), [..., (L + 1) · H]."""

    def __init__(self, settings: dict[str, Any], *, hidden_size: int, num_layers: int, eps: float) -> None:
        super().__init__(settings, hidden_size=hidden_size, num_layers=num_layers, eps=eps)
        self.columns = num_layers + 1

    def expansion(self) -> nn.Module:
        """The embedding twice: as the stream and as the first output."""
        return StreamAndFirst(self.columns)

    def read(self, sublayer: int) -> nn.Module:
        """The stream, at the end too."""
        return FirstColumn(self.hidden_size)

    def join(self, sublayer: int) -> nn.Module:
        """The plain sum; behind the MLP the average too."""
        layer, is_mlp = divmod(sublayer, 2)
        if not is_mlp:
            return StreamSum(self.hidden_size)
        chosen = averaged(layer, self.settings["dilation"], self.settings["period"])
        return DenseAverage(layer, chosen, self.columns, self.hidden_size)

    def view(self, state: Tensor) -> Tensor:
        """The current stream."""
        return state[..., : self.hidden_size]


def averaged(layer: int, dilation: int, period: int) -> list[int]:
    """Which outputs (0 the embedding, i + 1 layer i's) are averaged behind a layer; none where it is left out."""
    own = layer + 1
    return list(range(own % dilation, own + 1, dilation)) if own % period == 0 else []


class StreamAndFirst(nn.Module):
    """(embedding, embedding, 0, …)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., H] → [..., columns · H]."""
        return F.pad(torch.cat((embedded, embedded), dim=-1), (0, (self.columns - 2) * embedded.shape[-1]))


class StreamSum(nn.Module):
    """The branch in the current stream."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., columns · H] → [..., columns · H]."""
        stream, outputs = state[..., : self.hidden_size], state[..., self.hidden_size :]
        return torch.cat((stream + branch, outputs), dim=-1)


class DenseAverage(nn.Module):
    """output = stream + f, kept; stream ← Σ_j weights_j output_j.

    Args:
        layer: from 0.
        chosen: outputs that are averaged, its own last; none leaves the stream as it is.
        columns: of the state.
        hidden_size: H.
    """

    def __init__(self, layer: int, chosen: list[int], columns: int, hidden_size: int) -> None:
        super().__init__()
        self.layer, self.chosen, self.columns, self.hidden_size = layer, chosen, columns, hidden_size
        if chosen:
            self.weights = nn.Parameter(F.one_hot(torch.tensor(len(chosen) - 1), len(chosen)).float())

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., columns · H] → [..., columns · H]."""
        stream, *outputs = state.unflatten(-1, (self.columns, self.hidden_size)).unbind(dim=-2)
        output = stream + branch
        known = [*outputs[: self.layer + 1], output]
        if self.layer + 2 < self.columns:
            outputs[self.layer + 1] = output
        if self.chosen:
            weights = self.weights.to(state.dtype)
            terms = [weights[place] * known[source] for place, source in enumerate(self.chosen)]
            output = functools.reduce(torch.add, terms)
        return torch.cat((output, *outputs), dim=-1)


extend = extension(Path)
