"""Bytes of real tensors: what autograd keeps for backward passes, and what a trainer's buffers hold."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer


class _Handle:
    """Stands for a saved tensor in the graph, and goes when the graph lets it go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Storages that autograd keeps, each counted once, now and at most so far.

    Args:
        apart: tensors whose storages are not counted.
    """

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        self.apart = list(apart)
        self.holders: Counter[int] = Counter()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Handle:
        """Count the storage until the handle goes."""
        handle, storage = _Handle(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        # Asked now: a mechanism may put other memory under a parameter while a pass lasts.
        if address and address not in {tensor.untyped_storage().data_ptr() for tensor in self.apart}:
            self.holders[address] += 1
            self.storages[address] = storage
            weakref.finalize(handle, self._release, address)
            self.peak = max(self.peak, self.bytes())
        return handle

    def _release(self, address: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.storages[address]

    def bytes(self) -> int:
        """Of what is still allocated: recompute frees some of it after it was kept."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextlib.contextmanager
def kept_for_backward(models: Iterable[torch.nn.Module], *others: torch.Tensor) -> Iterator[Kept]:
    """What the block's forward passes keep, without the models' parameters and buffers and `others`."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    kept = Kept([*tensors, *others])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda handle: handle.tensor):
        yield kept


def forward_bytes(model: torch.nn.Module, *, samples: int, seq_length: int, vocab_size: int) -> int:
    """Kept by one forward pass of random tokens [samples, seq_length], up to the loss of each token."""
    tokens = torch.randint(0, vocab_size, (samples, seq_length))
    with kept_for_backward([model]) as kept:
        loss = model(tokens, torch.arange(seq_length).expand_as(tokens), None, labels=tokens)
        total = kept.bytes()
    assert loss.requires_grad
    return total


def trainer_bytes(trainer: Trainer) -> dict[str, int]:
    """Weights with buffers, gradients and optimizer state of a trainer that has made a step; storages count once."""
    # Not the wrapper's `buffers`, which are those of gradients.
    weights = [tensor for model in trainer.models for tensor in (*model.parameters(), *model.module.buffers())]
    state = [
        tensor
        for part in trainer.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *part.optimizer.state[parameter].values())
        if torch.is_tensor(tensor)
    ]
    seen: set[int] = set()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        fresh = {address: nbytes for address, nbytes in storages.items() if address not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    gradients = [buffer.grad_data for model in trainer.models for buffer in _buffers(model)]
    return {"weights": size(weights), "gradients": size(gradients), "optimizer": size(state)}


def step_bytes(trainer: Trainer) -> dict[str, int]:
    """`trainer_bytes` after one training step, and the most that its forward passes kept. Collective."""
    from sparsecod_megatron.train.step import train_step
    from tests.helpers.training import trainer_batches

    gradients = [buffer.grad_data for model in trainer.models for buffer in _buffers(model)]
    with kept_for_backward([model.module for model in trainer.models], *gradients) as kept:
        train_step(trainer, trainer_batches(trainer))
    return {**trainer_bytes(trainer), "activations": kept.peak}


def _buffers(model: Any) -> list[Any]:
    return [*model.buffers, *model.expert_parallel_buffers]
