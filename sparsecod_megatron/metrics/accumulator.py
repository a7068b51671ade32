"""The buffer that carries every layer's sums until one reduction: [layers, statistics, 2] = (Σ value, count).

It stays on the device, so adding to it never waits for the GPU; the host sees it once per collected step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecod_megatron.parallel import all_reduce_sums


class LayerAccumulator:
    """Sums of named statistics for all layers of the model, also those that other pipeline stages hold.

    Args:
        num_layers: layers of the whole model.
        names: the statistics, in buffer order.
        device: where values come from.
    """

    def __init__(self, *, num_layers: int, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._sums = torch.zeros((num_layers, len(self.names), 2), dtype=torch.float64, device=device)

    def add(self, layer: int, name: str, value: torch.Tensor, count: int) -> None:
        """Add Σ value (a scalar on the device) over `count` terms. Local, without waiting for the device.

        Args:
            layer: 0-based index in the whole model.
            name: one of the names.
            value: sum over this rank's terms, shape [].
            count: number of terms.
        """
        row = self._sums[layer, self._index[name]]
        row[0] += value
        row[1] += count

    def reset(self) -> None:
        """Forget everything added."""
        self._sums.zero_()

    def reduce(self) -> list[dict[str, float]]:
        """Global means, one dict a layer. Collective over all processes; waits for the device once.

        Returns:
            For each layer, Σ value / Σ count by name. Statistics that no process added are absent.
        """
        totals = all_reduce_sums(self._sums.clone()).cpu()
        return [
            {name: float(value / count) for name, (value, count) in zip(self.names, layer, strict=True) if count > 0}
            for layer in totals
        ]
