"""The buffer that carries every layer's sums until one reduction: [layers, statistics, 2] = (Σ value, count).

It stays on the device, so adding to it never waits for the GPU; the host sees it once per collected step. Maxima, which
no sum can carry, travel in the same reduction: every rank fills a row of its own, so that their sum lists them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sparsecod_megatron.parallel import all_reduce_sums


class LayerAccumulator:
    """Sums of named statistics for all layers of the model, also those that other pipeline stages hold.

    Args:
        num_layers: layers of the whole model.
        names: the sums, in buffer order.
        maxima: the values of which the largest is kept; none is negative.
        device: where values come from.
    """

    def __init__(
        self, *, num_layers: int, names: Sequence[str], maxima: Sequence[str] = (), device: torch.device
    ) -> None:
        self.names, self.maxima = tuple(names), tuple(maxima)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._maximum_index = {name: index for index, name in enumerate(self.maxima)}
        self._sums = torch.zeros((num_layers, len(self.names), 2), dtype=torch.float64, device=device)
        self._maxima = torch.zeros((num_layers, len(self.maxima)), dtype=torch.float64, device=device)

    def add(self, layer: int, name: str, value: torch.Tensor, count: int | torch.Tensor) -> None:
        """Add Σ value (a scalar on the device) over `count` terms. Local, without waiting for the device.

        Args:
            layer: 0-based index in the whole model.
            name: one of the names.
            value: sum over this rank's terms, shape [].
            count: number of terms, or the sum that the value is a share of.
        """
        row = self._sums[layer, self._index[name]]
        row[0] += value
        row[1] += count

    def add_layers(self, layers: Sequence[int], name: str, values: torch.Tensor, counts: torch.Tensor) -> None:
        """Add to the sums of several layers, of which one may be there several times. Local, as `add`.

        Args:
            layers: 0-based indices in the whole model.
            name: one of the names.
            values: one sum for each, [layers].
            counts: one number of terms for each, [layers].
        """
        rows = self._sums[:, self._index[name]]
        for layer, pair in zip(layers, torch.stack((values.double(), counts.double()), dim=1), strict=True):
            rows[layer] += pair

    def add_many(self, layer: int, names: Sequence[str], values: torch.Tensor, count: int) -> None:
        """Add a vector to neighbouring sums, without a loop over them. Local, without waiting for the device.

        Args:
            layer: 0-based index in the whole model.
            names: neighbours in the buffer, in its order.
            values: one sum a name, [names].
            count: number of terms of each.
        """
        first = self._index[names[0]]
        assert self.names[first : first + len(names)] == tuple(names), "these sums are not neighbours"
        rows = self._sums[layer, first : first + len(names)]
        rows[:, 0] += values
        rows[:, 1] += count

    def add_maximum(self, layer: int, name: str, value: torch.Tensor) -> None:
        """Keep `value`, shape [] and not negative, if it is the largest. Local, without waiting for the device."""
        row = self._maxima[layer, self._maximum_index[name]]
        torch.maximum(row, value.double(), out=row)

    def reset(self) -> None:
        """Forget everything added."""
        self._sums.zero_()
        self._maxima.zero_()

    def reduce(self, *, maxima: bool = True) -> list[dict[str, float]]:
        """Global means and maxima, one dict per layer. Collective over all processes; waits for the device once.

        Args:
            maxima: False leaves them out where no group that is due takes any.

        Returns:
            For each layer, Σ value / Σ count by name, and the maxima. Statistics that no process added are absent.
        """
        sums, rows = self._reduce(maxima=maxima and bool(self.maxima))
        layers = [
            {name: float(value / count) for name, (value, count) in zip(self.names, layer, strict=True) if count > 0}
            for layer in sums
        ]
        if len(rows):
            for layer, row in zip(layers, rows.amax(dim=0).tolist(), strict=True):
                layer.update(zip(self.maxima, row, strict=True))
        return layers

    def _reduce(self, *, maxima: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Total sums [layers, names, 2], and every rank's maxima [ranks or 0, layers, maxima]; both on the host."""
        rank, size = dist.get_rank(), dist.get_world_size() if maxima else 0
        rows = self._maxima.new_zeros((size, *self._maxima.shape))
        rows[rank : rank + 1] = self._maxima
        packed = all_reduce_sums(torch.cat((self._sums.flatten(), rows.flatten()))).cpu()
        sums, listed = packed.split((self._sums.numel(), rows.numel()))
        return sums.view_as(self._sums), listed.view_as(rows)
