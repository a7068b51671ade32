"""A transformers model's forward pass in float64, without holding the model in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def computing_in_float64(model: Any) -> Iterator[None]:
    """While the block runs, an fp32 causal language model computes in float64. Local.

    Each block, norm and the output layer is widened when its turn comes and narrowed after it, both exactly, so that
    one of them is in memory twice as wide, not the model. What the class itself computes in fp32 (the statistics of
    norms, rotary tables, router probabilities) stays so.
    """
    decoder = model.get_decoder()
    modules = [*decoder.layers, decoder.norm, model.get_output_embeddings(), getattr(decoder, "embedding_norm", None)]
    handles = [decoder.embed_tokens.register_forward_hook(lambda _module, _inputs, output: output.double())]
    for module in modules:
        if module is not None:
            handles.append(module.register_forward_pre_hook(_widen))
            handles.append(module.register_forward_hook(_narrow, always_call=True))
    # The products of all experts at once that torch has know no float64.
    experts = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(experts)
        for handle in handles:
            handle.remove()


def _widen(module: nn.Module, _inputs: tuple[Any, ...]) -> None:
    module.double()


def _narrow(module: nn.Module, _inputs: tuple[Any, ...], _output: Tensor) -> None:
    module.float()
