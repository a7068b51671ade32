"""What settings of mechanisms that read token ids share: the layers that there are, and what cannot go with them."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.seams.mechanism import Mechanism


def token_problems(mechanism: Mechanism, config: RunConfig, layers: list[int]) -> Iterator[str]:
    """What no mechanism that reads token ids can have, one line each.

    Args:
        mechanism: that reads them.
        config: the run.
        layers: where it acts.
    """
    yield from layer_problems(mechanism, config.model, layers)
    if config.megatron.get("recompute_granularity") == "selective" and "mlp" in (
        config.megatron.get("recompute_modules") or ()
    ):
        yield (
            f"megatron.recompute_modules: mlp is computed again without the token ids of mechanisms.{mechanism.name}; "
            "leave it out, or use megatron.recompute_granularity=full"
        )
    if config.megatron.get("delay_wgrad_compute"):
        yield f"megatron.delay_wgrad_compute: true, but the tables of mechanisms.{mechanism.name} cannot; remove it"


def layer_problems(mechanism: Mechanism, model: ModelConfig, layers: list[int]) -> Iterator[str]:
    """Layers that are none, that the model has not, or that are named twice."""
    key, last = mechanism.key("layers"), model.num_layers - 1
    if not layers:
        yield f"{key}: names no layer; name at least one of 0 … {last}, or remove the mechanism"
    for layer in dict.fromkeys(layers):
        if not 0 <= layer <= last:
            yield f"{key}: {layer}, but model.num_layers={model.num_layers} has layers 0 … {last}; correct it"
        if layers.count(layer) > 1:
            yield f"{key}: {layer} is named {layers.count(layer)} times; name it once"


def small_layers(layers: list[int], model: ModelConfig, small: ModelConfig) -> list[int]:
    """Layers of a small model at the same depths, each once."""
    return sorted({layer * small.num_layers // model.num_layers for layer in layers})
