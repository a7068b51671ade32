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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.changes import Changes, eligible, holder
from sparsecod_megatron.compression.experts import is_fused
from sparsecod_megatron.compression.method import Material, Needs, Outcome
from sparsecod_megatron.compression.methods.low_rank import LINEAR, Factoring, put_factors
from sparsecod_megatron.compression.passes import Notes, dense_statistics
from sparsecod_megatron.compression.watching import Slot, slots_of_parameter
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
        self._left: dict[Tensor, str] = {}

    def compress(self, material: Material) -> Outcome:
        """Factorise the matrices that the threshold makes smaller."""
        notes, model, dense = Notes(), material.model, self.settings.store == "dense"
        slots = {name: slots_of_parameter(model, name) for name in self._taken(model)}
        spectra = dict(self._spectra(material, slots, notes))
        ranks = ranks_for(spectra, self.settings.saved)
        for name, matrices in slots.items():
            if any(slot.key in ranks for slot in matrices):
                for slot in matrices:
                    self._put(material.changes, slot, spectra[slot.key], ranks.get(slot.key), notes)
            elif matrices[0].key in spectra:
                reason = "at the threshold two thin matrices would store as many weights or more"
                self._left[model.get_parameter(name)] = reason
            else:
                self._left[model.get_parameter(name)] = "it lies outside the model's blocks"
        warnings = notes.warnings("their weights alone")
        if dense:
            saved, total = _saved(spectra, ranks), sum(each.weights for each in spectra.values())
            share = f"{saved / total:.2%}" if total else "none"
            warnings.append(f"store=dense writes products; factors would store {share} of these weights less")
            return Outcome(warnings=warnings)
        return Outcome(
            structure={"ranks": {key.removesuffix(".weight"): rank for key, rank in ranks.items()}}, warnings=warnings
        )

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Weights outside linear layers, without a place for factors, or no smaller by them."""
        if weight in self._left:
            return self._left[weight]
        if is_fused(module) and self.settings.store == "factors":
            return "experts in one tensor, which has no place for factors; store=dense writes their products"
        return f"not among layers={self.settings.layers}" if is_fused(module) else super().reason(module, weight)

    def _taken(self, model: PreTrainedModel) -> list[str]:
        """Names of the parameters among `layers` that can be written as products."""
        dense = self.settings.store == "dense"
        found = [name for name, _ in eligible(model) if fnmatchcase(name.removesuffix(".weight"), self.settings.layers)]
        modules = {name: holder(model, name) for name in found}
        return [name for name, each in modules.items() if isinstance(each, LINEAR) or (dense and is_fused(each))]

    def _put(self, changes: Changes, slot: Slot, spectrum: Spectrum, rank: int | None, notes: Notes) -> None:
        """Write a matrix of a certain rank; None leaves it, among experts that do not all become smaller."""
        squares, measured = spectrum.values.square(), self.settings.by == "outputs" and slot.key not in notes.unreached
        lost = float(squares[rank:].sum()) if rank is not None else 0.0
        left = spectrum.left[:, :rank].to(slot.weight.device)
        if slot.expert is not None:
            old = slot.weight.float()
            outputs = (lost, float(squares.sum())) if measured else None
            changes.put_piece(slot.name, slot.weight, old if rank is None else left @ (left.T @ old), outputs)
            return
        error = math.sqrt(lost / float(squares.sum())) if measured and squares.sum() else None
        layer, dense = slot.name.removesuffix(".weight"), self.settings.store == "dense"
        put_factors(changes, layer, slot.module, left, dense=dense, output_error=error)

    def _spectra(
        self, material: Material, slots: Mapping[str, list[Slot]], notes: Notes
    ) -> Iterator[tuple[str, Spectrum]]:
        for part in self._parts(material, slots, notes):
            found = material.processes.distribute(part, _spectra_of)
            yield from zip([slot.key for slot, _ in part], found, strict=True)

    def _parts(
        self, material: Material, slots: Mapping[str, list[Slot]], notes: Notes
    ) -> Iterator[Sequence[tuple[Slot, Tensor | None]]]:
        """All matrices at once, or a block's as soon as its inputs are known, for no more Grams are held."""
        if self.settings.by == "outputs":
            yield from dense_statistics(material, list(slots), notes)
        else:
            yield [(slot, None) for matrices in slots.values() for slot in matrices]


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


def _spectra_of(part: Sequence[tuple[Slot, Tensor | None]]) -> list[Spectrum]:
    return [spectrum_of(slot.weight.float(), gram) for slot, gram in part]


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
