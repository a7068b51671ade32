"""What compression does to each matrix of a model, measured while it is done, and which of them it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.parts import row_parts
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.residency import Residency


@dataclass(frozen=True)
class MatrixChange:
    """One weight of two or more axes; experts in one 3-D parameter are one.

    Attributes:
        name: of the parameter, before the change.
        shape: its axes before the change, `[..., out, in]`.
        compressed: whether the method took it.
        reason: why it was left as it was, or empty.
        stored: weights stored in its place now.
        zeros: share of them that are zero.
        relative_error: Frobenius norm of the change ÷ that of the old weights; None where it is not measured.
        unmeasured: why it is not, or empty.
        output_error: Frobenius norm of the outputs' change ÷ that of the old outputs, over the calibration inputs that
            the method saw; None where it is not measured.
        neuron_distance: mean over rows of the matrix of W₁ between their outputs before and after, in standard
            deviations of the outputs before; None where it is not measured.
    """

    name: str
    shape: tuple[int, ...]
    compressed: bool
    reason: str
    stored: int
    zeros: float
    relative_error: float | None
    unmeasured: str = ""
    output_error: float | None = None
    neuron_distance: float | None = None

    @property
    def num_weights(self) -> int:
        """Weights in it before the change."""
        return int(torch.Size(self.shape).numel())

    @property
    def kind(self) -> str:
        """The name without the numbers of layers and experts, such as `model.layers.*.mlp.up_proj`."""
        parts = self.name.removesuffix(".weight").split(".")
        return ".".join("*" if part.isdigit() else part for part in parts)


@dataclass(frozen=True)
class _Piece:
    """Squared Frobenius norms of one matrix's change and old values, and of its outputs'; its number of zeros."""

    change: float
    size: float
    num_zeros: int
    outputs: tuple[float, float] | None


class Changes:
    """Writes what a method makes of a model's weights into the model, in place, and measures it.

    Args:
        residency: of the model as it is before the method. What is written to must be in memory.

    Attributes:
        residency: the same.
    """

    def __init__(self, residency: Residency) -> None:
        self.residency, self._model = residency, residency.model
        self._shapes = {name: tuple(weight.shape) for name, weight in eligible(self._model)}
        self._rows: dict[str, MatrixChange] = {}
        self._pieces: dict[str, list[_Piece]] = {}

    @torch.no_grad()
    def put(self, name: str, weight: Tensor, *, output_error: float | None = None) -> None:
        """Write new values of a parameter; of another shape where the method changes the configuration to match.

        Args:
            name: of the parameter, of any: embeddings and norms are written without a row in the report.
            weight: of any floating-point type, stored in the parameter's.
            output_error: as in `MatrixChange`, where the method knows it.

        Raises:
            ConversionError: non-finite values.
        """
        old = self._model.get_parameter(name)
        self._require_finite(name, weight)
        if weight.shape != old.shape:
            unmeasured = f"its shape was {list(old.shape)} and is {list(weight.shape)}"
            self._record(name, [weight], None, unmeasured, output_error)
            module, _, leaf = name.rpartition(".")
            # A copy, because a slice of the old weights would keep all of them in memory.
            values = weight.detach().to(old).clone(memory_format=torch.contiguous_format)
            new = nn.Parameter(values, requires_grad=old.requires_grad)
            setattr(self._model.get_submodule(module), leaf, new)
            return
        self._record(name, [weight], relative_error(old, weight), output_error=output_error)
        old.copy_(weight)
        self.residency.changed(name)

    @property
    def has_begun(self) -> bool:
        """Whether anything was written."""
        return bool(self._rows or self._pieces)

    @torch.no_grad()
    def put_piece(self, name: str, old: Tensor, new: Tensor, outputs: tuple[float, float] | None) -> None:
        """Write new values of one matrix of a parameter, which has one, or one for each expert.

        Args:
            name: of the parameter.
            old: a view of the parameter, which is written to.
            new: of the same shape, stored in the parameter's type.
            outputs: squared Frobenius norms of the outputs' change and of the old outputs, or None.

        Raises:
            ConversionError: non-finite values.
        """
        self._require_finite(name, new)
        values = new.to(old.dtype)
        change, size = (sum(parts) for parts in zip(*_squares(values, old), strict=True))
        num_zeros = values.numel() - int(torch.count_nonzero(values))
        self._pieces.setdefault(name, []).append(_Piece(change, size, num_zeros, outputs))
        old.copy_(values)
        self.residency.changed(name)

    @torch.no_grad()
    def exchange(
        self,
        name: str,
        module: nn.Module,
        *,
        product: Tensor | None,
        output_error: float | None = None,
        neuron_distance: float | None = None,
    ) -> None:
        """Put another module in the place of a linear layer.

        Args:
            name: of the linear layer's weight.
            module: what takes its place.
            product: `[out, in]`, the matrix that `module` multiplies by; None where it is not one matrix.
            output_error: as in `MatrixChange`, where the method knows it.
            neuron_distance: likewise.

        Raises:
            ConversionError: non-finite values.
        """
        weights = [weight for weight in module.parameters() if weight.ndim > 1]
        for weight in weights:
            self._require_finite(name, weight)
        old = self._model.get_parameter(name)
        if product is None:
            unmeasured = f"{type(module).__name__} does not multiply by one matrix"
            self._record(name, weights, None, unmeasured, output_error, neuron_distance)
        else:
            self._record(name, weights, relative_error(old, product), "", output_error, neuron_distance)
        self._model.set_submodule(name.rpartition(".")[0], module)

    def rows(self, reason: Callable[[nn.Module, Tensor], str]) -> list[MatrixChange]:
        """A row for each matrix that could have been compressed, in the model's order.

        Args:
            reason: of a method, why it leaves a matrix of this module as it is.
        """
        found = {name: self._rows.get(name) or self._pieced(name) for name in self._shapes}
        left = [name for name, row in found.items() if row is None]
        rows = found | {name: self._left(name, reason) for name in self.residency.in_turn(left)}
        return [row for row in rows.values() if row is not None]

    def _pieced(self, name: str) -> MatrixChange | None:
        pieces = self._pieces.get(name)
        if not pieces:
            return None
        weight, outputs = self._model.get_parameter(name), [piece.outputs for piece in pieces if piece.outputs]
        error = _root_ratio([(piece.change, piece.size) for piece in pieces])
        output_error = _root_ratio(outputs) if outputs else None
        share, stored = sum(piece.num_zeros for piece in pieces) / weight.numel(), weight.numel()
        return MatrixChange(name, self._shapes[name], True, "", stored, share, error, output_error=output_error)

    def _left(self, name: str, reason: Callable[[nn.Module, Tensor], str]) -> MatrixChange:
        weight = self._model.get_parameter(name)
        said = reason(holder(self._model, name), weight)
        assert said, f"{name} was neither changed nor left for a reason"
        return MatrixChange(name, self._shapes[name], False, said, weight.numel(), zeros([weight]), 0.0)

    def _record(
        self,
        name: str,
        weights: Sequence[Tensor],
        error: float | None,
        unmeasured: str = "",
        output_error: float | None = None,
        neuron_distance: float | None = None,
    ) -> None:
        if name in self._shapes:
            stored, share = sum(weight.numel() for weight in weights), zeros(weights)
            measured = (error, unmeasured, output_error, neuron_distance)
            self._rows[name] = MatrixChange(name, self._shapes[name], True, "", stored, share, *measured)

    @staticmethod
    def _require_finite(name: str, weight: Tensor) -> None:
        if not all(bound.isfinite() for bound in weight.aminmax()):  # without a copy, as `isfinite` of all would be
            raise ConversionError(f"{name}: the method made non-finite weights; use another method")


def eligible(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices that could be compressed: all but embeddings and the output layer, which no method takes."""
    for name, parameter in model.named_parameters():
        module = holder(model, name)
        if parameter.ndim > 1 and not isinstance(module, nn.Embedding) and module is not model.get_output_embeddings():
            yield name, parameter


def holder(model: nn.Module, parameter: str) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(parameter.rpartition(".")[0])


def relative_error(old: Tensor, new: Tensor) -> float:
    """Frobenius norm of the change ÷ that of the old weights; 0 where there were none."""
    change = torch.linalg.vector_norm(new.detach().float() - old.detach().float())
    size = torch.linalg.vector_norm(old.detach().float())
    return float(change / size) if size else 0.0


def _squares(new: Tensor, old: Tensor) -> Iterator[tuple[float, float]]:
    """Squared Frobenius norms of the change and of the old weights, a few rows at a time."""
    for rows in row_parts(old):
        before = old[rows].float()
        yield float((new[rows].float() - before).square_().sum()), float(before.square().sum())


def _root_ratio(squares: Sequence[tuple[float, float]]) -> float:
    """√(Σ first ÷ Σ second); 0 where there is nothing to divide by."""
    size = sum(square for _, square in squares)
    return math.sqrt(max(0.0, sum(square for square, _ in squares)) / size) if size else 0.0


def zeros(weights: Sequence[Tensor]) -> float:
    """Share of zeros among all entries."""
    return 1 - sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(weight.numel() for weight in weights)


def compressed_fraction(rows: Sequence[MatrixChange]) -> float:
    """Share of the weights of eligible matrices that lie in compressed ones."""
    return sum(row.num_weights for row in rows if row.compressed) / sum(row.num_weights for row in rows)
