"""What residual paths report of themselves: means over tokens of what their reads and joins weigh by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator

Reported = Callable[..., Mapping[str, Tensor]]
"""What a read or join hands to its observer → values by name, one of each token or several."""
SHUT = 0.05
"""A gate below it moves its stream by less than a twentieth."""


class StreamReports:
    """Means over tokens, and over attention and MLP, of what a path's modules hand to `observe`.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
        names: of all values.
        reported: a path's values.
        lists: names of lists, each of values `NAME_0`, `NAME_1`, …
    """

    maxima: tuple[str, ...] = ()

    def __init__(
        self, models: Sequence[Any], names: tuple[str, ...], reported: Reported, lists: tuple[str, ...] = ()
    ) -> None:
        self.names, self._reported, self._lists = names, reported, lists
        layers = [layer for model in models for layer in model.decoder.layers]
        self._modules = [(layer.layer_number - 1, module) for layer in layers for module in _observed(layer)]

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Sum in every training forward pass inside the block. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        @torch.no_grad()
        def observe(layer: int, *given: Tensor) -> None:
            if not in_backward():
                for name, values in self._reported(*given).items():
                    sums.add(layer, name, values.double().sum(), values.numel())

        for layer, module in self._modules:
            module.observe = partial(observe, layer)
        try:
            yield
        finally:
            for _, module in self._modules:
                module.observe = None

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; nothing of what its modules do not have."""
        known = {name: means[name] for name in self.names if name in means}
        found: dict[str, float | list[float]] = {
            name: value for name, value in known.items() if name.rpartition("_")[0] not in self._lists
        }
        for each in self._lists:
            values = [value for name, value in known.items() if name.rpartition("_")[0] == each]
            found |= {each: values} if values else {}
        return found


def _observed(layer: Any) -> Iterator[Any]:
    places = (layer.input_layernorm, layer.self_attn_bda, layer.pre_mlp_layernorm, layer.mlp_bda)
    for place in places:
        for name in ("read", "write"):
            if hasattr(module := getattr(place, name, None), "observe"):
                yield module


STREAM_NAMES = ("mix_distance", "mix_row_error", "mix_gain", "mix_second", "stream_write", "stream_cosine")
"""What `mixing_reports` gives."""


def mixing_reports(mixing: Tensor, write: Tensor, x: Tensor) -> dict[str, Tensor]:
    """‖M - I‖_F, the largest |row sum - 1|, σ_1 and σ_2 of M, shares of the branch, mean cosine between two streams.

    Args:
        mixing: M, [..., to, from].
        write: [..., n].
        x: streams before the join, [..., n, H].
    """
    distance = torch.linalg.matrix_norm(mixing.float() - torch.eye(mixing.shape[-1], device=mixing.device))
    rows = (mixing.float().sum(dim=-1) - 1).abs().amax(dim=-1)
    singular = torch.linalg.svdvals(mixing.float())
    return {
        "mix_distance": distance,
        "mix_row_error": rows,
        "mix_gain": singular[..., 0],
        "mix_second": singular[..., 1],
        "stream_write": write,
        "stream_cosine": cosines(x),
    }


def cosines(x: Tensor) -> Tensor:
    """Mean cosine between two of a token's streams, [..., n, H] → [...]; 1 of one stream."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    total, streams = unit.sum(dim=-2).square().sum(dim=-1), x.shape[-2]
    return (total - streams) / max(streams * (streams - 1), 1) if streams > 1 else torch.ones_like(total)


def gate_reports(gates: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Shares by which streams move, the share of shut gates, and the mean cosine between two streams.

    Args:
        gates: [..., n].
        x: streams before the join, [..., n, H].
    """
    return {"stream_gate": gates, "stream_shut": (gates < SHUT).float(), "stream_cosine": cosines(x)}


def depth_reports(weights: Tensor) -> dict[str, Tensor]:
    """Weight of each source, and the entropy of a token's weights over that of equal ones, [..., sources]."""
    sources = weights.shape[-1]
    entropy = torch.special.entr(weights.float()).sum(dim=-1) / torch.log(torch.tensor(float(sources)))
    return {"depth_entropy": entropy} | {f"depth_weight_{i}": weights[..., i] for i in range(sources)}
