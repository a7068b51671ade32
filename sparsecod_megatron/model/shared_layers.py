"""Layers that compute with the parameters of another: each stays a module of its own, with hooks, number and buffers.

So recompute, statistics, schedules and exports see as many layers as are applied, and what counts, steps or sends
parameters sees each once, under its first name. Autograd adds up the gradients of all uses; where a recomputed layer
makes its own in a backward pass of its own, Megatron-Core's buckets add them, and wait for as many as the first step
had (`golden_per_param_grad_ready_counts`).

Source: Megatron-Core 0.16.1 distributed/distributed_data_parallel.py, distributed/param_and_grad_buffer.py.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from sparsecod_megatron.config.parameters import ParameterTable


def share_layers(chunk: GPTModel, table: ParameterTable) -> None:
    """Put the parameters of owners in the places of their copies'. Local.

    Args:
        chunk: as built, without wrappers, before anything keeps its parameters.
        table: of the model's parameters; owners and copies are in one chunk.
    """
    layers = {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
    for index, layer in layers.items():
        if (owner := table.owner(index)) == index:
            continue
        shared = dict(layers[owner].named_parameters(remove_duplicate=False))
        names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
        assert names == list(shared), f"layers {owner} and {index} have other parameters"
        for name in names:
            place, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(place), attribute, shared[name])
