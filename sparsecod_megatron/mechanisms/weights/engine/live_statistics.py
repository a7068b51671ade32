"""The layers' statistics of marked weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsecod_megatron.mechanisms.weights.engine.marks import Marks
from sparsecod_megatron.mechanisms.weights.engine.settings import KINDS
from sparsecod_megatron.seams.plugin import Plugin

if TYPE_CHECKING:
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator


class LiveShare:
    """live_share: of the layer's weights that can be marked, the share that is not; live_qkv, …: by kind of matrix.

    dead_neurons: share of the MLPs' neurons one of whose input rows is zero throughout.

    Args:
        marks: of this process.
    """

    names: tuple[str, ...] = ("live_share", *(f"live_{kind}" for kind in KINDS), "dead_neurons")
    maxima: tuple[str, ...] = ()

    def __init__(self, marks: Plugin | None) -> None:
        assert isinstance(marks, Marks)
        self._marks = marks

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Count what this process owns when the block ends. Local."""
        self._marks.is_observed = True
        try:
            yield
        finally:
            self._marks.is_observed = False
        for piece in self._marks.places.pieces:
            count = piece.marked.numel()
            live = count - piece.marked.count_nonzero()
            for name in ("live_share", f"live_{piece.shard.row.init}"):
                sums.add(piece.shard.matrix.layer, name, live, count)
        for layer, dead, count in self._marks.dead_neurons:
            sums.add(layer, "dead_neurons", dead, count)

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none where it is dense."""
        return {name: means[name] for name in self.names if name in means}
