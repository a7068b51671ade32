"""What compression did to each matrix of a model, and which of them it left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.experts import is_fused
from sparsecod_megatron.errors import ConversionError

SIZE_RULES = {"sparse24": (8, 16), "sparsegpt24": (4, 4)}
"""What the rows and columns of a matrix must be multiples of, by ModelOpt method."""


@dataclass(frozen=True)
class Matrix:
    """One weight of two or more axes; experts in one 3-D parameter are one.

    Attributes:
        name: name of the parameter.
        shape: its axes, `[..., out, in]`.
        compressed: whether the method took it.
        reason: why it was left as it was, or empty.
        zeros: share of weights that are zero now.
        relative_error: Frobenius norm of the change ÷ that of the old weights.
    """

    name: str
    shape: tuple[int, ...]
    compressed: bool
    reason: str
    zeros: float
    relative_error: float

    @property
    def num_weights(self) -> int:
        """Weights in it."""
        return int(torch.Size(self.shape).numel())

    @property
    def kind(self) -> str:
        """The name without the numbers of layers and experts, such as `model.layers.*.mlp.up_proj`."""
        parts = self.name.removesuffix(".weight").split(".")
        return ".".join("*" if part.isdigit() else part for part in parts)


def eligible(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices that could be compressed: all but embeddings and the output layer, which no method takes."""
    for name, parameter in model.named_parameters():
        module = holder(model, name)
        if parameter.ndim > 1 and not isinstance(module, nn.Embedding) and module is not model.get_output_embeddings():
            yield name, parameter


def holder(model: nn.Module, parameter: str) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(parameter.rpartition(".")[0])


def compare(model: PreTrainedModel, weights: Mapping[str, Tensor], method: str) -> list[Matrix]:
    """A row for each eligible matrix.

    Args:
        model: with the old weights.
        weights: the compressed ones by name, in the shape of the old.
        method: that made them.

    Raises:
        ConversionError: there are none, or one has changed its shape or holds non-finite values.
    """
    rows = []
    for name, old in eligible(model):
        new = weights.get(name, old)
        if new.shape != old.shape or not torch.isfinite(new).all():
            raise ConversionError(f"{name}: {method} made {tuple(new.shape)} non-finite or misshapen weights")
        change = torch.linalg.vector_norm(new.detach().float() - old.detach().float())
        size = torch.linalg.vector_norm(old.detach().float())
        rows.append(
            Matrix(
                name=name,
                shape=tuple(old.shape),
                compressed=name in weights,
                reason="" if name in weights else _reason(holder(model, name), old, method),
                zeros=1 - int(torch.count_nonzero(new)) / new.numel(),
                relative_error=float(change / size) if size else 0.0,
            )
        )
    if not any(row.compressed for row in rows):
        reasons = sorted({row.reason for row in rows}) or ["the model has no matrices but embeddings and output layer"]
        raise ConversionError(f"--method {method}: no linear layer was compressed: {'; '.join(reasons)}")
    return rows


def compressed_fraction(rows: Sequence[Matrix]) -> float:
    """Share of the weights of eligible matrices that lie in compressed ones."""
    return sum(row.num_weights for row in rows if row.compressed) / sum(row.num_weights for row in rows)


def follows_pattern(weight: Tensor) -> bool:
    """Whether at most two of every four neighbours along the last axis are not zero."""
    if weight.shape[-1] % 4:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, 4)).sum(dim=-1, dtype=torch.uint8) <= 2).all())


def _reason(module: nn.Module, weight: Tensor, method: str) -> str:
    rows, columns = SIZE_RULES.get(method, (1, 1))
    taken = isinstance(module, nn.Linear) or is_fused(module)
    if taken and (weight.shape[-2] % rows or weight.shape[-1] % columns):
        return f"rows and columns must be multiples of {rows} and {columns}"
    return "ModelOpt skips routers, gates of experts and layers that are not linear"
