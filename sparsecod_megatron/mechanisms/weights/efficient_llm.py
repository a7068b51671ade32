"""EfficientLLM's search: groups are pruned a few at a time during pretraining, by how much the loss would change.

A group's saliency is the sum over its weights of (w ∂L/∂w)², averaged over steps with a decay: the Taylor expansion of
the loss with the squared gradient in place of the Hessian. The number of dead groups grows linearly between two shares
of the steps. While training, groups stay in the matrices as zeros; an export leaves them out as far as its class has
widths for it (`hf/dead_groups.py`).

Not here is the paper's second-order update, by which weights that remain make up for those that are pruned. What was at
hand (the abstract, notes of readers, and a repository that has no training code) says that it goes by a layer's own
Hessian in place of the saliency's global diagonal, but not by which formula, over what inputs or gradients, how many
steps or with what damping, so that nothing could be tested against it. Here the loss alone moves them.

Source: Xing et al., EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge Language Models
(arXiv 2502.06663); the saliency is Molchanov et al.'s, Importance Estimation for Neural Network Pruning (arXiv
1906.10771).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import at_least, between, choice
from sparsecod_megatron.mechanisms.weights.engine.group_marks import GroupMarks, GroupMechanism
from sparsecod_megatron.mechanisms.weights.engine.schedules import is_choice, ramp, step_of_share
from sparsecod_megatron.seams.plugin import STATE_PREFIX, StepContext, StepParts

SALIENCY = "saliency"


@dataclass
class EfficientLlm(GroupMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "efficient_llm"

    scope: str = choice("global", "matrix")
    """`global`: all groups of the model compete, so that widths of layers follow. `matrix`: the same share of each."""
    start: float = between(0, 1, 0.1)
    """Share of the steps before the first group dies."""
    end: float = between(0, 1, 0.8)
    """Share of them after which none dies any more."""
    interval: int = at_least(1, 20)
    """Steps from one choice to the next."""
    memory: float = field(default=0.9, metadata={"minimum": 0, "below": 1})
    """What of the saliency so far stays with each step."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And phases in a wrong order."""
        yield from super().problems(config)
        if self.start > self.end:
            yield f"{self.key('start')}: {self.start} is above {self.key('end')}={self.end}; lower it"

    def share(self, context: StepContext) -> float:
        """Linear."""
        return ramp(context.progress, start=self.start, end=self.end, kind="linear")

    def plugin(self, parts: StepParts) -> SalientGroups:
        """Prunes."""
        return SalientGroups(self, parts)


class SalientGroups(GroupMarks):
    """Prunes groups by saliency.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: EfficientLlm

    def __init__(self, settings: EfficientLlm, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self.saliency = torch.zeros(self.groups.number, device=self.places.device)

    def is_due(self, context: StepContext) -> bool:
        """Every `interval` steps of the way, and at its end."""
        first, last = (step_of_share(share, context) for share in (self.settings.start, self.settings.end))
        return is_choice(context.step, first=first, last=last, interval=self.settings.interval)

    def on_gradients(self, context: StepContext) -> None:
        """Take the saliency first: a dead weight's is zero. Collective over all processes."""
        values = ((piece.master * piece.gradient).square_() for piece in self.places.pieces)
        memory = self.settings.memory
        self.saliency = memory * self.saliency + (1 - memory) * self.groups.sums(values)
        super().on_gradients(context)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """The least salient; dead groups first, which stay dead. Collective over all processes."""
        dead = self.groups.sums(piece.marked for piece in self.places.pieces) > 0
        return self.smallest(self.saliency.masked_fill(dead, -1.0), context)

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """And the saliency. Collective over all processes."""
        from megatron.core.dist_checkpointing import ShardedTensor

        key = f"{STATE_PREFIX}{self.name}.{SALIENCY}"
        kept = ShardedTensor.from_rank_offsets(key, self.saliency.cpu(), replica_id=dist.get_rank())
        return super().sharded_state(model_state) | {SALIENCY: kept}

    def restore(self, tensors: dict[str, Any]) -> None:
        """And the saliency."""
        super().restore(tensors)
        self.saliency = tensors[SALIENCY].to(self.places.device)
