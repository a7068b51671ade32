"""Fewer (or more) experts per token from a step on: progressive sparsification, a number for each layer.

A balancing loss reaches its minimum with a uniform router however uneven the choice is, and with one expert per token
the first layers stay uneven. So a run starts with more experts in those layers, and goes to the final numbers late,
when its routers have learnt. `at` is that point: steps up to it use `model.moe_router_topk` (or `_per_layer`), the
others the numbers here. It follows from the step alone, so nothing of it is kept in a checkpoint, and a checkpoint is
exported with the numbers of its own step.

Every layer has its own copy of Megatron-Core's configuration, from which the router's losses and the dispatcher read
the number; the all-to-all dispatcher reads it in each pass, the others keep what they were built with and are refused.

Source: Sigma-MoE-Tiny (arXiv 2512.16248), progressive sparsification scheduling; its published code sets the number by
layer when it is built. When it switches there, and from which numbers, could not be checked.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.check_model import depth_of_experts_problems, group_problems
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.seams.mechanism import Folds, LayerSite, Mechanism, mixed
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class TopkSchedule(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "moe_router_topk_schedule"

    at: float = above(0, 0.9)
    """Last step with the former numbers: a share of `train.train_steps` below 1, a step from 1 on."""
    topk: int = at_least(1, 1)
    """Experts per token after it."""
    topk_per_layer: list[int] | None = None
    """One number for each layer, in place of `topk`; entries of dense layers are not read."""

    def has_switched(self, context: StepContext) -> bool:
        """Whether a step uses the later numbers."""
        last = self.at * context.last_step if self.at < 1 else self.at
        return context.step > round(last)

    def later(self, model: ModelConfig) -> ModelConfig:
        """The model after the switch."""
        if self.topk_per_layer is not None:
            return replace(model, moe_router_topk_per_layer=self.topk_per_layer)
        return replace(model, moe_router_topk=self.topk, moe_router_topk_per_layer=None)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No experts, numbers that no router can choose, and dispatchers that keep the first number."""
        name, model = f"mechanisms.{self.name}", config.model
        if not model.is_moe:
            yield f"model.num_moe_experts: null, but {name} is of experts; set it, or remove the mechanism"
            return
        later = self.later(model)
        for problem in (*depth_of_experts_problems(later), *group_problems(later)):
            yield f"{name}: after the switch {problem}"
        if self.at >= 1 and self.at != int(self.at):
            yield f"{self.key('at')}: {self.at} is neither a share below 1 nor a whole step; round it"
        if (kind := config.megatron.get("moe_token_dispatcher_type", "alltoall")) != "alltoall":
            yield f"megatron.moe_token_dispatcher_type: {kind} keeps the first numbers of {name}; use alltoall"

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Layers with experts have a configuration of their own."""
        if site.model.is_moe_layer(site.layer):
            spec.module = mixed(OwnConfig, spec.module)
        return spec

    def model_at(self, model: ModelConfig, context: StepContext) -> ModelConfig:
        """With the numbers of the step."""
        return self.later(model) if self.has_switched(context) else model

    def plugin(self, parts: StepParts) -> Plugin:
        """What sets the numbers."""
        return TopkSwitch(self, parts)

    def made_small(self, model: ModelConfig, small: ModelConfig) -> TopkSchedule:
        """As many entries as the small model has layers, of experts that it has."""
        most = small.num_moe_experts or 1
        numbers = self.topk_per_layer and [min(number, most) for number in self.topk_per_layer]
        if numbers:
            numbers = numbers[: small.num_layers] + numbers[-1:] * (small.num_layers - len(numbers))
        return replace(self, topk=min(self.topk, most), topk_per_layer=numbers)

    def export(self, model: ModelConfig) -> Folds:
        """The numbers of the checkpoint's step are the model's."""
        return Folds()


class OwnConfig:
    """What a layer becomes: one that shares no configuration with others."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(copy.copy(config), *arguments, **options)  # type: ignore[call-arg]


class TopkSwitch(Plugin):
    """Sets the experts per token of each layer before every pass.

    Args:
        schedule: its settings.
        parts: models of this rank.
    """

    def __init__(self, schedule: TopkSchedule, parts: StepParts) -> None:
        self.name = schedule.name
        self._schedule, self._model = schedule, parts.config.model
        layers = [layer for model in parts.models for layer in model.decoder.layers]
        self._layers = [layer for layer in layers if self._model.is_moe_layer(layer.layer_number - 1)]

    @contextlib.contextmanager
    def effective_weights(self, context: StepContext) -> Iterator[None]:
        """The step's numbers, which stay until the next pass. Local."""
        model = self._schedule.model_at(self._model, context)
        for layer in self._layers:
            number = model.topk(layer.layer_number - 1)
            layer.mlp.router.topk = layer.mlp.config.moe_router_topk = number
        yield

    def metrics(self, context: StepContext) -> dict[str, float]:
        """experts_per_token: mean over layers with experts."""
        model = self._schedule.model_at(self._model, context)
        numbers = [model.topk(layer) for layer in range(model.num_layers) if model.is_moe_layer(layer)]
        return {"experts_per_token": sum(numbers) / len(numbers)}
