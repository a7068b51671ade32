"""What must not change: a model in an evaluation, and in a step whose update is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sparsecod_megatron.checkpoint.random_states import unchanged_random_states


class KeptBuffers:
    """All buffers of a model, persistent or not, as they were when this was made. Local.

    Schedules write some during a step, as the expert bias when gradients are reduced, before anyone knows whether
    the step counts (Megatron-Core distributed/finalize_model_grads.py:476).

    Args:
        models: model chunks of this rank.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        # Not `buffers()`: the data-parallel wrapper calls its gradient buffers so.
        named = (entry for model in models for entry in model.named_buffers())
        self._buffers = [(buffer, buffer.detach().clone()) for _, buffer in named]

    @torch.no_grad()
    def restore(self) -> None:
        """Put every value back."""
        for buffer, before in self._buffers:
            buffer.copy_(before)


@contextmanager
def evaluating(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The models in evaluation mode inside the block; modes, buffers and random states as before after it. Local.

    Args:
        models: model chunks of this rank.
    """
    training = [(module, module.training) for model in models for module in model.modules()]
    buffers = KeptBuffers(models)
    for model in models:
        model.eval()
    try:
        with unchanged_random_states():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        buffers.restore()
