"""What acts inside the optimizer step, between Megatron-Core's own parts, and keeps state in the checkpoint.

    with effective_weights(context)       forward and backward passes, of validation too; gradients are reduced
    with extra_loss(context, …)           the passes of a step that trains, in which it adds terms to the loss
    on_gradients(context)                 before the gradient norm, so that norm, judge and clip see what it leaves
    after_update(context, optimizer)      on the fp32 slices that one torch optimizer stepped, before they are gathered
    step_ended(context, updated)          whether there was an update, on ranks without an optimizer too

In fp32 those slices are views of the parameters: what reads latent weights must wait until the window has closed, as
`on_gradients` does. A run without plugins executes nothing of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import RunConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

STATE_PREFIX = "mechanisms."
"""Prefix of the key of every tensor that a plugin keeps in a checkpoint; the mechanism's name follows."""


@dataclass(frozen=True)
class StepParts:
    """What a plugin acts on.

    Attributes:
        config: the run.
        models: the GPTModel chunks of this rank, without wrappers.
        optimizer: the chain of optimizers over them.
        groups: the run's process groups.
    """

    config: RunConfig
    models: Sequence[GPTModel]
    optimizer: ChainedOptimizer
    groups: ProcessGroupCollection


@dataclass(frozen=True)
class StepContext:
    """Where the run is.

    Attributes:
        step: counted from 1; steps whose update was left out count too. For a validation or an export, the step that
            has been taken: 0 before the first.
        last_step: `train.train_steps`.
    """

    step: int
    last_step: int

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done when this one is."""
        return self.step / self.last_step


class Plugin:
    """Does nothing at each of its places; a mechanism overrides those it needs.

    Attributes:
        name: the mechanism's, under which a checkpoint keeps the state.
        has_window: whether `effective_weights` does anything, so that all weights must have arrived before it.
    """

    name: str
    has_window: ClassVar[bool] = False

    def weights_replaced(self) -> None:
        """The weights came from elsewhere: drawn, or loaded from any checkpoint. Local."""

    def effective_weights(self, context: StepContext) -> AbstractContextManager[None]:
        """While it is open the parameters hold what the model computes with. Collective over all processes."""
        return contextlib.nullcontext()

    def companions(self) -> Sequence[torch.nn.Module]:
        """Models, one for each chunk of the run's, that see every micro-batch of a step before the run's do. Local.

        Without gradients or labels; what they find is for `extra_loss`. Chunks see micro-batches in the same order as
        the run's. Under pipeline parallelism they have seen all of a step's before its first is trained on.
        """
        return ()

    def extra_loss(self, context: StepContext, num_microbatches: int) -> AbstractContextManager[None]:
        """While it is open, forward passes add terms to the loss, or to the gradients of what they compute. Local.

        What a term gives a rank's gradient is averaged over data- and context-parallel ranks and, as the loss itself
        is, already divided by the number of micro-batches.

        Args:
            context: the step.
            num_microbatches: of this rank in it.
        """
        return contextlib.nullcontext()

    def on_gradients(self, context: StepContext) -> None:
        """Change `main_grad` of this rank's slices, which is reduced over data-parallel ranks. Collective."""

    def after_update(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """Change masters and moments that an optimizer has just stepped. Local: ranks may hold other optimizers.

        What needs other ranks is decided in `on_gradients`. A step whose update is left out does not come here.
        """

    def step_ended(self, context: StepContext, *, updated: bool) -> None:
        """The step is over; without an update, what `on_gradients` prepared was not used. Collective."""

    def metrics(self, context: StepContext) -> dict[str, float]:
        """What the line of metrics says of it. Local, on the first rank at logged steps; it may wait for the device."""
        return {}

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Tensors for the checkpoint, by any key. Collective over all processes.

        Args:
            model_state: Megatron-Core's sharded state of the weights, which tells how each is cut.

        Returns:
            `ShardedTensor`s and factories whose own keys begin with `STATE_PREFIX` and the name.
        """
        return {}

    def restore(self, tensors: dict[str, Any]) -> None:
        """Take loaded tensors, by the keys of `sharded_state`; `weights_replaced` follows. Local."""


@contextlib.contextmanager
def effective_weights(plugins: Sequence[Plugin], context: StepContext) -> Iterator[None]:
    """The windows of all plugins, opened in order. Collective over all processes where a plugin's is."""
    with contextlib.ExitStack() as windows:
        for plugin in plugins:
            windows.enter_context(plugin.effective_weights(context))
        yield


@contextlib.contextmanager
def extra_losses(plugins: Sequence[Plugin], context: StepContext, num_microbatches: int) -> Iterator[None]:
    """The terms of all plugins; arguments as of `Plugin.extra_loss`. Local."""
    with contextlib.ExitStack() as terms:
        for plugin in plugins:
            terms.enter_context(plugin.extra_loss(context, num_microbatches))
        yield
