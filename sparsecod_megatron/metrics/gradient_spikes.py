"""Gradient elements far above what Adam's second moment expects of them, by layer.

With g the gradient that Adam takes (after clipping, as every gradient in its moments was), v its second moment BEFORE
the update and t the updates that v has seen, v̂ = v / (1 − β₂ᵗ) estimates the mean of g², and over all parameters of a
layer (embeddings, output layer and final norm are in no layer)

    spike_frac  share of elements with g² / v̂ > 50
    spike_max   largest g² / v̂

With v after the update the ratio could never exceed 1 / (1 − β₂), 20 for β₂ = 0.95, whatever the gradient. Elements
with v = 0 have had no gradient yet (an expert that got no token) and say nothing; they are left out. So are matrices
that Muon steps, which have no second moment. The first step of a run has no history and no values.

Every element is counted by one process (`owned_slices.py`); see `parameter_norms.py` for how sums become sums.

Source: Huang et al., SPAM (arXiv 2501.06842), the ratio; Kingma and Ba, Adam (arXiv 1412.6980), the bias correction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.parallel.owned_slices import OwnedSlices, owned_slices

SPIKE_RATIO = 50.0
"""g² / v̂ above which an element is a spike: some seven standard deviations."""


class GradientSpikesGroup:
    """spike_frac, spike_max.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
        optimizer: the optimizers over them.
    """

    names: tuple[str, ...] = ("spike_elements", "spike_known")
    maxima: tuple[str, ...] = ("spike_max",)

    def __init__(self, models: Sequence[GPTModel], optimizer: ChainedOptimizer) -> None:
        self._layers = [layer.layer_number - 1 for model in models for layer in model.decoder.layers]
        self._owned = owned_slices(models, optimizer)
        self._device = next(models[0].parameters()).device
        self._count = 1 if models[0].pg_collection.tp_dp_cp.rank() == 0 else 0

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe gradients and moments as the optimizer begins its step inside the block. Local."""
        found = torch.zeros((3, len(self._layers)), dtype=torch.float64, device=self._device)
        with contextlib.ExitStack() as stack:
            for owned in self._owned:
                handle = owned.optimizer.register_step_pre_hook(lambda *_, owned=owned: _add_spikes(found, owned))
                stack.callback(handle.remove)
            yield
        spikes, known, largest = found
        for row, layer in enumerate(self._layers):
            sums.add(layer, "spike_elements", spikes[row], self._count)
            sums.add(layer, "spike_known", known[row], self._count)
            sums.add_maximum(layer, "spike_max", largest[row])

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics; none before Adam has a history."""
        if not means["spike_known"]:
            return {}
        return {"spike_frac": means["spike_elements"] / means["spike_known"], "spike_max": means["spike_max"]}


@torch.no_grad()
def _add_spikes(found: Tensor, owned: OwnedSlices) -> None:
    """Add to `found` [3, layers], by layer, the elements above the ratio, those with history, and the largest ratio."""
    groups = {parameter: group for group in owned.optimizer.param_groups for parameter in group["params"]}
    for row, master in zip(owned.layers, owned.masters, strict=True):
        second_moment = owned.optimizer.state.get(master, {}).get("exp_avg_sq")
        if second_moment is None or master.grad is None or master.numel() == 0:
            continue
        group = groups[master]
        correction = 1 - group["betas"][1] ** group.get("step", 0)
        expected = second_moment.float() / correction
        known = expected > 0
        ratio = torch.where(known, master.grad.float().square() / expected, 0.0)
        found[0, row] += (ratio > SPIKE_RATIO).sum()
        found[1, row] += known.sum()
        found[2, row] = torch.maximum(found[2, row], ratio.max().double())
