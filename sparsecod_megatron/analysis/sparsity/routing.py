"""Mixtures of experts in a model's blocks: which experts each token is sent to, and the model without one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.expert_modules import (
    is_fused_experts,
    is_stacked_linear,
    replaced_forward,
    unwatchable,
)

Watcher = Callable[[Tensor], None]
"""Called with the chosen experts of a pass, `[tokens, k]`; an index beyond the last expert is a dropped slot."""


class ExpertLayer(Protocol):
    """The routed experts of one block."""

    layer: int
    name: str
    num_experts: int

    def watched(self, watcher: Watcher) -> Any:
        """Context in which `watcher` is told every choice the router makes."""
        ...

    def without(self, expert: int) -> Any:
        """Context in which one expert's output is zero; the other experts keep the weights the router gave them."""
        ...


class FusedExperts:
    """Experts held as three-dimensional parameters by one module that is told the router's choice."""

    def __init__(self, layer: int, name: str, module: nn.Module) -> None:
        self.layer = layer
        self.name = name
        self.num_experts: int = module.get_parameter("down_proj").shape[0]
        self._module = module

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """See `ExpertLayer`."""
        original = self._module.forward

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            watcher(index)
            return original(hidden, index, weights)

        with replaced_forward(self._module, forward):
            yield

    @contextmanager
    def without(self, expert: int) -> Iterator[None]:
        """See `ExpertLayer`."""
        original = self._module.forward

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return original(hidden, index, weights.masked_fill(index == expert, 0))

        with replaced_forward(self._module, forward):
            yield


class ListedExperts:
    """Experts that are modules of a list; the choice is what a sibling of the list answers in integers."""

    def __init__(self, layer: int, name: str, mixture: nn.Module, experts: nn.ModuleList) -> None:
        self.layer = layer
        self.name = name
        self.num_experts = len(experts)
        self._experts = experts
        self._siblings = [child for child in mixture.children() if child is not experts]

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """See `ExpertLayer`."""
        num_calls = 0

        def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            nonlocal num_calls
            for part in output if isinstance(output, tuple) else (output,):
                if isinstance(part, Tensor) and not part.is_floating_point():
                    watcher(part.reshape(-1, part.shape[-1]))
                    num_calls += 1

        handles = [module.register_forward_hook(note) for module in self._siblings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not num_calls:
            raise ConversionError(f"block {self.layer}, {self.name}: no router beside the experts names its choice")

    @contextmanager
    def without(self, expert: int) -> Iterator[None]:
        """See `ExpertLayer`."""
        handle = self._experts[expert].register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
        try:
            yield
        finally:
            handle.remove()


def find_experts(blocks: Iterable[nn.Module]) -> list[ExpertLayer]:
    """The mixtures of all blocks, in order.

    Args:
        blocks: the model's blocks.

    Raises:
        ConversionError: there are none, or they cannot be watched.
    """
    found: list[ExpertLayer] = []
    for layer, block in enumerate(blocks):
        for path, module in block.named_modules():
            if is_fused_experts(module):
                found.append(FusedExperts(layer, path, module))
            elif isinstance(experts := getattr(module, "experts", None), nn.ModuleList):
                found.append(ListedExperts(layer, f"{path}.experts", module, experts))
            elif is_stacked_linear(module):
                raise unwatchable(module)
    if not found:
        raise ConversionError("no routed experts in any block: leave experts out of --scores for a dense model")
    return found


@contextmanager
def watching(layers: Sequence[ExpertLayer], watchers: Sequence[Watcher]) -> Iterator[None]:
    """Watch several mixtures at once.

    Args:
        layers: the mixtures.
        watchers: one for each.
    """
    with ExitStack() as stack:
        for layer, watcher in zip(layers, watchers, strict=True):
            stack.enter_context(layer.watched(watcher))
        yield
