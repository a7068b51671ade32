"""Weights that the model computes with and the optimizer never sees: the latent ones stand again when the pass is over.

While the window is open the parameters hold W ⊙ m (or W ⊙ (m + (1 − m) β)), so that every kernel, fused or not, takes
its products and gradients with them; `main_grad` is then the gradient of what was computed with. Outside of it
checkpoint, optimizer and statistics see W. Masks follow from W, which every data-parallel rank holds alike, so nothing
is kept and nothing communicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.patterns import smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.places import Piece, Places
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts


class WindowSettings(Protocol):
    """What a window asks its mechanism; it asks at every pass, because a step may have other answers."""

    name: ClassVar[str]

    def has_mask(self, kind: ParameterKind, layer: int) -> bool:
        """As `WeightMechanism.has_mask`."""

    def marks(self, kind: ParameterKind) -> bool:
        """As `WeightMechanism.marks`."""

    def n_and_m(self, context: StepContext) -> tuple[int, int]:
        """The pattern of a step; n = m is dense."""

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """As `WeightMechanism.live_counts`."""

    def dead_factor(self, context: StepContext) -> float:
        """What the model multiplies a masked weight by."""


class MaskedWindow(Plugin):
    """n:m masks by magnitude, made afresh for every pass; a subclass may change gradients.

    Args:
        settings: of the run.
        parts: what it acts on.

    Attributes:
        places: of the weights.
        flips: (layer, changed, all) between the last two passes, of the masks that this rank counts.
    """

    has_window: ClassVar[bool] = True

    def __init__(self, settings: WindowSettings, parts: StepParts) -> None:
        self.name, self.settings = settings.name, settings
        self.places = Places(parts, settings.has_mask, settings.marks)
        self.table = ParameterTable.of(parts.config)
        self.masks: dict[torch.nn.Parameter, Tensor] = {}
        self.flips: list[tuple[int, Tensor, int]] = []
        self.is_observed = False

    def change_gradient(self, piece: Piece, dead: Tensor, context: StepContext) -> None:
        """Change the gradient of a piece, whose master holds latent weights. Local.

        Args:
            piece: of a matrix.
            dead: which of its weights the mask leaves out, bool, flat.
            context: the step.
        """

    @contextlib.contextmanager
    def effective_weights(self, context: StepContext) -> Iterator[None]:
        """Put the masks on, and the latent weights back. Local."""
        n, m = self.settings.n_and_m(context)
        if n == m:
            self.masks = {}
            yield
            return
        factor, latent = self.settings.dead_factor(context), {}
        before, self.masks = self.masks, {}
        for _, shard in self.places.shards:
            parameter = shard.parameter
            latent[parameter] = parameter.data
            dead = self.masks[parameter] = smallest_of_each(parameter, n, m)
            # Other memory under the same parameter: the latent weights, of which masters may be views, are not copied.
            parameter.data = masked(parameter.data, dead, factor)
        if self.is_observed:
            self._count_flips(before)
        try:
            yield
        finally:
            for parameter, weight in latent.items():
                parameter.data = weight

    @torch.no_grad()
    def on_gradients(self, context: StepContext) -> None:
        """Change the gradient where the mask of the pass says so."""
        for piece in self.places.pieces if self.masks else ():
            self.change_gradient(piece, piece.slice_of(self.masks[piece.shard.parameter]), context)

    def metrics(self, context: StepContext) -> dict[str, float]:
        """Share of weights with a mask that the model computes with, and FLOPs without the others."""
        live = self.settings.live_counts(self.table, context)
        flops = self.places.effective_flops_per_token(context, live)
        total = sum(matrix.size for matrix in self.places.matrices)
        return {"live_share": sum(live) / total, "effective_flops_per_token": flops}

    def _count_flips(self, before: dict[torch.nn.Parameter, Tensor]) -> None:
        self.flips = [
            (shard.matrix.layer, (dead != self.masks[shard.parameter]).sum(), dead.numel())
            for shard in self.places.counted_shards()
            if (dead := before.get(shard.parameter)) is not None
        ]


def masked(weight: Tensor, dead: Tensor, factor: float) -> Tensor:
    """The weight with what is dead multiplied by a factor."""
    if not factor:
        return masking.zeroed(weight, dead)
    result = weight.clone()
    masking.scale_(result, dead, factor)
    return result


class FlipShare:
    """mask_flips: share of the layer's mask that differs from the pass before.

    Args:
        window: of this process.
    """

    names: tuple[str, ...] = ("mask_flips",)
    maxima: tuple[str, ...] = ()

    def __init__(self, window: MaskedWindow) -> None:
        self._window = window

    @contextlib.contextmanager
    def collecting(self, sums: object) -> Iterator[None]:
        """Compare the masks of the last pass inside the block with those of the pass before it. Local."""
        self._window.is_observed = True
        try:
            yield
        finally:
            self._window.is_observed = False
        for layer, flips, count in self._window.flips:
            sums.add(layer, "mask_flips", flips, count)  # type: ignore[attr-defined]

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none before the second pass."""
        return {"mask_flips": means["mask_flips"]} if "mask_flips" in means else {}
