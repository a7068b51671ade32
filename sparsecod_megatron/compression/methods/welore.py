"""WeLore: low rank by one threshold for all matrices, so that each loses what its own spectrum can spare.

With σ_1 ≥ σ_2 ≥ … the singular values of a matrix, those at most τ·σ_1 are dropped, and τ is the least for which the
model stores the wanted share of weights less. A matrix that two thin ones would not make smaller stays as it is.

With `by=outputs` the spectrum is that of W·H^½, H = Σ x·xᵀ over the inputs in the dense model: the product of rank r
with the smallest ‖X(W − W')ᵀ‖ is U_r·U_rᵀ·W, U its left singular vectors, and that error is √Σ_{j>r} σ_j².

Source: arXiv 2407.11239. The paper's τ is found by the mean reduction of ranks, which is not one of weights: a square
matrix of a rank above half of its width is larger as two.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsecod_megatron.compression.method import Material, Needs, Outcome
from sparsecod_megatron.compression.methods.low_rank import Factoring, matrix_of, put_factors
from sparsecod_megatron.compression.passes import Notes, dense_statistics
from sparsecod_megatron.config.fields import choice
from sparsecod_megatron.errors import ConversionError


@dataclass
class WeLoreSettings:
    """How much is saved, by which spectrum, and what is written."""

    saved: float = field(default=0.2, metadata={"above": 0.0, "below": 1.0})
    """Share of the weights of all linear layers among `layers` that the model stores less."""
    by: str = choice("weights", "outputs")
    """Singular values of W, without data as published; or of W·H^½, by what the outputs lose."""
    store: str = choice("factors", "dense")
    """Two thin matrices, in our own class; or their product in the stock class, which saves nothing, to measure."""
    layers: str = "*"
    """Names of the layers to take, with `*`, such as `*.mlp.*`."""


@dataclass(frozen=True)
class Spectrum:
    """A matrix as its factors are made from it.

    Attributes:
        shape: (in, out).
        values: singular values, largest first, float64 `[min(in, out)]`.
        left: singular vectors, float32 `[out, most]`: of no more of them than two thin matrices may have.
    """

    shape: tuple[int, int]
    values: Tensor
    left: Tensor

    @property
    def weights(self) -> int:
        """Weights of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def most(self) -> int:
        """The largest rank of which two thin matrices store less."""
        return (self.weights - 1) // sum(self.shape)

    @property
    def relative(self) -> Tensor:
        """Singular values over the largest; zeros where all are."""
        return self.values / self.values[:1].clamp_min(torch.finfo(torch.float64).tiny)


class WeLore(Factoring):
    """See the module."""

    name = "welore"
    Settings = WeLoreSettings

    def __init__(self, settings: WeLoreSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(calibration=settings.by == "outputs")
        self._left: dict[nn.Module, str] = {}

    def compress(self, material: Material) -> Outcome:
        """Factorise the matrices that the threshold makes smaller."""
        notes, layers, dense = Notes(), dict(self.linear_layers(material.model)), self.settings.store == "dense"
        spectra = dict(self._spectra(material, layers, notes))
        ranks = ranks_for(spectra, self.settings.saved)
        for layer, module in layers.items():
            if layer not in spectra:
                self._left[module] = "it lies outside the model's blocks"
            elif layer not in ranks:
                self._left[module] = "at the threshold two thin matrices would store as many weights or more"
            else:
                left = spectra[layer].left[:, : ranks[layer]].to(module.weight.device)
                error = self._output_error(layer, spectra[layer].values, ranks[layer], notes)
                put_factors(material.changes, layer, module, left, dense=dense, output_error=error)
        warnings = notes.warnings("their weights alone")
        if dense:
            saved, total = _saved(spectra, ranks), sum(each.weights for each in spectra.values())
            share = f"{saved / total:.2%}" if total else "none"
            warnings.append(f"store=dense writes products; factors would store {share} of these weights less")
        return Outcome(structure=None if dense else {"ranks": ranks}, warnings=warnings)

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Only linear layers are taken, and only where the threshold leaves two thin matrices smaller than one."""
        return self._left.get(module) or super().reason(module, weight)

    def _output_error(self, layer: str, values: Tensor, rank: int, notes: Notes) -> float | None:
        squares = values.square()
        if self.settings.by == "weights" or f"{layer}.weight" in notes.unreached or not squares.sum():
            return None
        return float((squares[rank:].sum() / squares.sum()).sqrt())

    def _spectra(self, material: Material, layers: dict[str, Any], notes: Notes) -> Iterator[tuple[str, Spectrum]]:
        for part in self._parts(material, layers, notes):
            found = material.processes.distribute(part, _spectra_of)
            yield from zip([each.layer for each in part], found, strict=True)

    def _parts(self, material: Material, layers: dict[str, Any], notes: Notes) -> Iterator[list[_Matrix]]:
        """All matrices at once, or a block's as soon as its inputs are known, for no more Grams are held."""
        if self.settings.by == "weights":
            yield [_Matrix(layer, module, None) for layer, module in layers.items()]
            return
        for seen in dense_statistics(material, [f"{layer}.weight" for layer in layers], notes):
            yield [_Matrix(slot.name.removesuffix(".weight"), slot.module, gram) for slot, gram in seen]


def ranks_for(spectra: Mapping[str, Spectrum], saved: float) -> dict[str, int]:
    """Ranks by the least threshold that saves enough.

    Args:
        spectra: of all matrices, by name.
        saved: share of their weights.

    Returns:
        The ranks of those that become smaller.

    Raises:
        ConversionError: a share that not even rank 1 everywhere saves.
    """
    relative = {name: spectrum.relative for name, spectrum in spectra.items()}
    wanted = saved * sum(spectrum.weights for spectrum in spectra.values())

    def ranks_at(threshold: float) -> dict[str, int]:
        ranks = {name: max(1, int((values > threshold).sum())) for name, values in relative.items()}
        return {name: rank for name, rank in ranks.items() if rank <= spectra[name].most}

    # The number of dropped values is what changes with the threshold, so only the values themselves can be the least.
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), *relative.values()]).unique().tolist()
    first = bisect.bisect_left(steps, True, key=lambda step: _saved(spectra, ranks_at(step)) >= wanted)
    if first == len(steps):
        most = _saved(spectra, ranks_at(1.0)) / max(1, sum(spectrum.weights for spectrum in spectra.values()))
        raise ConversionError(f"--method welore: rank 1 everywhere saves {most:.2%}; lower saved={saved}")
    return ranks_at(steps[first])


def _saved(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> int:
    return sum(spectra[name].weights - rank * sum(spectra[name].shape) for name, rank in ranks.items())


class _Matrix(NamedTuple):
    """A linear layer, and Σ x·xᵀ over its inputs where those count."""

    layer: str
    module: Any
    gram: Tensor | None


def _spectra_of(part: Sequence[_Matrix]) -> list[Spectrum]:
    return [spectrum_of(matrix_of(each.module), each.gram) for each in part]


def spectrum_of(matrix: Tensor, gram: Tensor | None) -> Spectrum:
    """Singular values and left singular vectors of W, or of W·H^½.

    Args:
        matrix: W, float32 `[out, in]`.
        gram: H, `[in, in]`, or None.
    """
    outputs, inputs = matrix.shape
    if gram is None:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    else:  # the eigenvectors of W H Wᵀ, which asks for no root and no inverse of an H that may be singular
        wide = matrix.double()
        product = wide @ gram.double() @ wide.T
        squares, vectors = torch.linalg.eigh((product + product.T) / 2)
        values, left = squares.flip(0).clamp_min(0).sqrt()[: min(matrix.shape)], vectors.flip(1)
    found = Spectrum((inputs, outputs), values.double().cpu(), left)
    return replace(found, left=left[:, : found.most].float().cpu().clone())
