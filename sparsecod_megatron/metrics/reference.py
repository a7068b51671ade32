"""The layer statistics of the reference code as it computed them, so that its published curves can be laid over ours.

They stand beside the right numbers under a `ref_` prefix, never instead of them. What differs:

    ref_out_var    out_var, but for the last layer of what the final norm makes of the residual stream, whose variance
                   says nothing about depth: the reference reads the hidden states that its model returns.
    ref_mlp_var    mlp_var for a dense layer; for a mixture of experts the variance of the whole residual stream after
                   the layer (for the last one before the final norm), which hides how little the experts add.
    ref_attn_norm  mean over micro-batches of the Frobenius norm of the attention branch. It grows with the square root
                   of the tokens that a rank sees of a micro-batch, so it depends on the micro-batch size and the layout
                   (as the reference's does); attn_rms does not.
    ref_mlp_norm   the same of the tensor that ref_mlp_var reads.

The attention's variance was right; the norm of the residual stream was not recorded. The reference logged rank 0 alone:
these are the means over all ranks, equal in expectation. Source: olmo/train.py (model_forward, train_batch) and
olmo/model.py (OLMoMoEBlock) of the code published with arXiv 2603.15389.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.metrics.hooks import Observer, observing
from sparsecod_megatron.metrics.variance import variance_sums


class ReferenceGroup:
    """ref_out_var, ref_mlp_var, ref_attn_norm, ref_mlp_norm.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("ref_out_var", "ref_mlp_var", "ref_attn_norm", "ref_mlp_norm")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel]) -> None:
        self.models = list(models)

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Local."""
        last = self.models[0].config.num_layers - 1
        layers = [layer for model in self.models for layer in model.decoder.layers]
        moe = {layer.layer_number - 1 for layer in layers if isinstance(layer.mlp, BaseMoELayer)}

        @torch.no_grad()
        def observe(layer: int, place: str, x: Tensor) -> None:
            if place == "attn":
                _add_norm(sums, layer, "ref_attn_norm", x)
            if place == "final" or (place == "out" and layer != last):
                _add_variance(sums, layer, "ref_out_var", x)
            if place == ("out" if layer in moe else "mlp"):
                _add_variance(sums, layer, "ref_mlp_var", x)
                _add_norm(sums, layer, "ref_mlp_norm", x)

        with observing(self.models, observe), _observing_final_norm(self.models, observe, last):
            yield

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        return {name: means[name] for name in self.names}


@contextlib.contextmanager
def _observing_final_norm(models: Sequence[GPTModel], observer: Observer, last: int) -> Iterator[None]:
    """Call `observer` with place `final` and layer `last` where the final norm runs, which no recompute repeats."""
    handles = [
        model.decoder.final_layernorm.register_forward_hook(
            lambda module, args, result: observer(last, "final", result.detach())
        )
        for model in models
        if model.decoder.final_layernorm is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_variance(sums: LayerAccumulator, layer: int, name: str, x: Tensor) -> None:
    sums.add(layer, name, variance_sums(x)[0], x.numel() // x.shape[-1])


def _add_norm(sums: LayerAccumulator, layer: int, name: str, x: Tensor) -> None:
    sums.add(layer, name, variance_sums(x)[1].sqrt(), 1)
