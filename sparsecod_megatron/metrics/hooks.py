"""Where statistics are observed: the places of a transformer layer, by forward hooks that remove themselves.

A layer of Megatron-Core computes, with h the residual stream of shape [S_local, B, H]:

    h  = h + attention(norm(h))      attn_in: h before,  attn: what is added
    h  = h + mlp(norm(h))            mlp_in:  h before,  mlp:  what is added       out: h after

or with the norms elsewhere (model/placement.py): where the branch is normalised, what is added is the norm's output.
Where a mechanism has a residual path of its own, `attn_in` and `mlp_in` are what it reads of its state for the branch,
`attn` and `mlp` what the branch hands to its join, and `out` its `view` of the state: one stream, not the packed ones.

The residual stream keeps H whole under tensor and sequence parallelism, and both branches are already summed over
tensor-parallel ranks, so a token's statistics never need another rank. Source: Megatron-Core
transformer/transformer_layer.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

PLACES = ("attn_in", "attn", "mlp_in", "mlp", "out")
"""What `observing` reports, in the order of the forward pass."""

Observer = Callable[[int, str, Tensor], None]
"""Called with the 0-based layer, the place, and its tensor [S_local, B, H], detached."""


@contextlib.contextmanager
def observing(models: Sequence[GPTModel], observer: Observer) -> Iterator[None]:
    """Call `observer` at every place of every layer that runs forward inside the block. Local.

    A forward pass that activation recompute runs again is seen once: the second run happens inside the backward pass.
    """
    handles = []
    for model in models:
        for layer in model.decoder.layers:
            handles.extend(_attach(layer, observer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(layer: TransformerLayer, observer: Observer) -> list[Any]:
    index = layer.layer_number - 1

    def observe(place: str, tensor: Tensor) -> None:
        if not in_backward():
            observer(index, place, tensor.detach().contiguous())  # one of a state's columns lies between others

    view: Callable[[Tensor], Tensor] = getattr(layer.mlp_bda, "view", lambda state: state)
    return [
        _watch_read(layer.input_layernorm, partial(observe, "attn_in")),
        *_watch_branch(layer.self_attention, layer.self_attn_bda, partial(observe, "attn")),
        _watch_read(layer.pre_mlp_layernorm, partial(observe, "mlp_in")),
        *_watch_branch(layer.mlp, layer.mlp_bda, partial(observe, "mlp")),
        layer.register_forward_hook(lambda module, args, result: observe("out", view(result[0]))),
    ]


def _watch_read(norm: torch.nn.Module, observe: Callable[[Tensor], None]) -> Any:
    """Call `observe` with what the norm before a branch is of."""
    read: torch.nn.Module | None = getattr(norm, "read", None)
    if read is not None:
        return read.register_forward_hook(lambda module, args, result: observe(result))
    return norm.register_forward_pre_hook(lambda module, args: observe(args[0]))


def _watch_branch(branch: torch.nn.Module, join: object, observe: Callable[[Tensor], None]) -> list[Any]:
    """Call `observe` with what the branch adds: its output, or the output of the norm that its join applies to it."""
    norm: torch.nn.Module | None = getattr(join, "branch_norm", None)
    if norm is not None:
        return [norm.register_forward_hook(lambda module, args, result: observe(result))]
    return [branch.register_forward_hook(lambda module, args, result: observe(_with_bias(*result)))]


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread; torch.utils.checkpoint asks the same way."""
    return torch._C._current_graph_task_id() != -1
