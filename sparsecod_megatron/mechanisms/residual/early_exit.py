"""Early exits: what layers leave is decoded by the model's own final norm and output layer, and trained on too.

    loss = Σ_l ẽ_l · CE(output(norm(x_l))),   ẽ_l = e_l / Σ e,   e_l = scale · (l + 1)(l + 2) / 2, last: L(L + 1) / 2

with x_l the stream behind layer l (from 0); the sum goes over the last layer and those whose turn it is: every
`rotation`-th, by one further each step. It is a negative control of depth scores: it makes the end of a model
dispensable by design. LayerSkip is this beside `layer_drop`. Validation, exports and the reported loss, by which a run
is judged, are of the last layer.

A term is added to the loss of each token, so that masks, micro-batches and layouts count as in the loss itself. Layers
that are computed again have no graph in the forward pass, so terms are of copies of x_l; the gradients that these get
are handed on where the backward pass comes to x_l, which it does later: the terms stand at the graph's end.

Source: Elhoushi et al., LayerSkip (arXiv 2404.16710), by torchtune's modules/early_exit_loss.py (`sum`, `rotational`),
whose sums count from 1; the gradual curriculum is not built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.seams.mechanism import Folds, Mechanism, RankShape, residual_state
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel


@dataclass
class EarlyExit(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "early_exit"
    shares_layers: ClassVar[bool] = True

    scale: float = at_least(0, 1.0)
    """Factor on the weights of all exits but the last."""
    rotation: int = at_least(1, 1)
    """Steps after which each layer has had its turn; 1: all layers in every step."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Stages without an output layer, states that no final norm reads, and who else watches it."""
        pipeline = config.parallel.pipeline_model_parallel_size
        if pipeline > 1:
            yield (
                f"parallel.pipeline_model_parallel_size: {pipeline}, but the exits of mechanisms.{self.name} need the "
                "output layer beside every layer; set it to 1"
            )
        if (columns := residual_state(config).columns) > 1:
            yield (
                f"mechanisms.{self.name}: the residual path has {columns} vectors per token, and exits read one; "
                "remove one of both"
            )
        if "distillation" in config.mechanisms:
            yield f"mechanisms.{self.name}: distillation watches the same output layer; remove one of both"

    def weights(self, model: ModelConfig, step: int) -> dict[int, float]:
        """ẽ of each layer (from 0) whose turn it is in a step (from 1), and of the last layer; their sum is 1."""
        last, turn = model.num_layers - 1, (step - 1) % self.rotation
        exits = [layer for layer in range(last) if layer % self.rotation == turn and self.scale]
        weights = {layer: self.scale * (layer + 1) * (layer + 2) / 2 for layer in exits}
        weights[last] = (last + 1) * (last + 2) / 2
        total = sum(weights.values())
        return {layer: weight / total for layer, weight in weights.items()}

    def plugin(self, parts: StepParts) -> Plugin:
        """What adds the terms."""
        return Exits(self, parts)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Final norm, output layer and softmax of an exit, in steps like the first, which has most of them."""
        if layer not in self.weights(model, step=1) or layer == model.num_layers - 1:
            return {}
        norm = rank.stream_tokens * rank.norm_bytes if model.final_norm else 0
        output = rank.stream_tokens * model.hidden_size * rank.value_bytes
        softmax = rank.tokens * ((model.vocab_size or 0) // rank.tensor * 4 + 1 + 8)
        return {"early_exit": norm + output + softmax}

    def export(self, model: ModelConfig) -> Folds:
        """The weights say it all."""
        return Folds()


class Exits(Plugin):
    """Adds the terms of a step's exits to the loss of each token.

    Args:
        settings: of the run.
        parts: models of this rank: one, which has all layers.
    """

    def __init__(self, settings: EarlyExit, parts: StepParts) -> None:
        self.name, self._settings, self._config = settings.name, settings, parts.config.model
        (self._model,) = parts.models
        self._copies: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def extra_loss(self, context: StepContext, num_microbatches: int) -> Iterator[None]:
        """Watch the layers whose turn it is, and the loss. Local."""
        weights = self._settings.weights(self._config, context.step)
        exits = [layer for layer in self._model.decoder.layers if layer.layer_number - 1 in weights][:-1]
        hooks = [layer.register_forward_hook(partial(self._leave, layer.layer_number - 1)) for layer in exits]
        if exits:
            hooks.append(self._model.register_forward_hook(partial(self._add, weights), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._copies.clear()

    def _leave(self, layer: int, module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        """Copy what a layer leaves, and let its gradient have what the copy's gets. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        state = output[0]
        if not in_backward():
            self._copies[layer] = state.detach().requires_grad_()
        if state.requires_grad:
            state.register_hook(partial(_with_gradient, self._copies[layer]))

    def _add(self, weights: dict[int, float], model: GPTModel, inputs: Any, options: Any, losses: Tensor) -> Tensor:
        """Loss of each token, [B, S_local], whose gradient is that of all exits. Collective over the TP group."""
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        *exits, last = weights.items()
        terms = (last[1] - 1) * losses
        for layer, weight in exits:
            state = self._copies[layer]
            if (norm := model.decoder.final_layernorm) is not None:
                state = norm(state)
            logits, _ = model.output_layer(state, weight=tied)
            terms = terms + weight * model.compute_language_model_loss(options["labels"], logits)
        return losses + (terms - terms.detach())


def _with_gradient(copy: Tensor, gradient: Tensor) -> Tensor:
    """What comes to the stream behind a layer, plus what came to its copy."""
    assert copy.grad is not None, "terms at the end of the graph have their gradients before the layers"
    return gradient + copy.grad
