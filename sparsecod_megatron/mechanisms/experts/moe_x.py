"""Experts chosen for the few units that a token would switch on: a router without weights, for ReLU experts.

The units' input weights of expert e, rows of W1_e [F, H], are taken for Gaussian in each channel, with mean μ_e and
variance v_e over its F units. A unit's input is then Gaussian too, with mean m = x·μ_e and variance s² = x²·v_e, and
positive with probability (1 + erf(m / √(2 s²))) / 2. The router's logits are −erf(m / √(2 s²)): the k experts that are
likely to be sparsest are chosen, and the rest is an ordinary router's: a softmax over them, balancing losses.

There is no router matrix. The moments are sums over units, so they are summed over the ranks that share an expert and
gathered from those that hold others, for all layers of a rank at once: before each pass over a global batch, which
computes with them throughout, whatever it computes again. They are constants of the backward pass: gradients reach the
token, not the weights through the moments.

Experts that were drawn alike have logits near 0, so at first the choice is noise and the balancing loss matters.

Source: Yang et al., Mixture of Experts Made Intrinsically Interpretable (arXiv 2503.07639): ReLU experts, and a router
by estimated sparsity. Only secondary sources could be read: a public port takes the same moments (variance without
correction) and the same erf, and lets gradients through. That the paper detaches the moments, and its exact logit,
could not be checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored
from sparsecod_megatron.seams.mechanism import LayerSite, Mechanism, Module, RankShape, mixed
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

ACTIVATIONS = ("relu", "relu2")
"""Those that are zero where a unit's input is negative."""


@dataclass
class MoeX(Mechanism):
    """The router; it has no settings."""

    name: ClassVar[str] = "moe_x"
    shapes_weights: ClassVar[bool] = True

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No experts, experts whose units are never off or cannot be read, and mechanisms that change them later."""
        name, model = f"mechanisms.{self.name}", config.model
        if not model.is_moe:
            yield f"model.num_moe_experts: null, but {name} is a router; set it, or remove the mechanism"
        if model.mlp_bias:
            yield f"model.mlp_bias: true, but {name} has no bias; set it to false"
        if model.activation not in ACTIVATIONS:
            yield f"model.activation: {model.activation} has no units that are off, which {name} counts; set relu"
        if config.precision.fp8:
            yield f"precision.fp8_recipe: {config.precision.fp8_recipe}, but {name} reads weights in bf16; remove it"
        if config.megatron.get("moe_grouped_gemm"):
            yield f"megatron.moe_grouped_gemm: true, but {name} reads experts one by one; remove it"
        for other in config.mechanisms.values():
            if isinstance(other, Factored) and "mlp_input" in other.kinds:
                yield f"{other.key('kinds')}: mlp_input has no matrix that {name} could read; name other kinds"
        if (last := list(config.mechanisms)[-1]) != self.name:
            yield f"{name}: stands before {last}, but reads the weights that others leave; put it last in `mechanisms`"

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """Without the router's matrix."""
        return () if kind.name == "router" else (kind,)

    def transformer_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Experts one by one."""
        return {"moe_grouped_gemm": False}

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Layers with experts have the router, and show it the experts."""
        if site.model.is_moe_layer(site.layer):
            submodules = spec.submodules.mlp.submodules
            submodules.router = mixed(SparsityRouter, submodules.router)
            spec.module = mixed(ShowsExperts, spec.module)
        return spec

    def plugin(self, parts: StepParts) -> Plugin:
        """What takes the moments."""
        return Moments(parts)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """The token in fp32 where it is not, its moments under each expert, and what erf is of."""
        if not model.is_moe_layer(layer):
            return {}
        channels = model.hidden_size if rank.value_bytes < 4 else 0
        return {"moe_x_router": rank.tokens * 4 * (channels + 4 * (model.num_moe_experts or 0))}

    def export(self, model: ModelConfig) -> Module:
        """The experts alone; the router takes their moments where it is loaded."""
        layers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
        return Module(
            code=Path(__file__).with_name("moe_x_sparsecod.py"),
            replaced=frozenset(f"decoder.layers.{layer}.mlp.router.weight" for layer in layers),
        )


class ShowsExperts:
    """What a layer becomes: its router knows its experts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        mlp = self.mlp  # type: ignore[attr-defined]
        # In a tuple, or they would be parts of the router too.
        mlp.router.shown = (mlp.experts,)


class SparsityRouter:
    """What a router becomes: its logits follow from the experts' weights.

    Attributes:
        shown: the layer's experts, alone in a tuple.
        moments: [E, 2, H] in fp32, mean and variance of each expert, during a pass; None takes them in each call.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)  # type: ignore[call-arg]
        self.register_parameter("weight", None)  # type: ignore[attr-defined]
        self.expert_groups = (pg_collection.expt_tp, pg_collection.ep)
        self.shown: tuple[Any, ...] = ()
        self.moments: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S_local, B, E] of tokens [S_local, B, H]. Collective over the experts' ranks outside a pass."""
        config: Any = self.config  # type: ignore[attr-defined]
        x = input.to(torch.float64 if config.moe_router_dtype == "fp64" else torch.float32)
        moments = self.moments
        if moments is None:
            (moments,) = experts_moments([self])
        return sparsity_logits(x, moments.to(x.dtype))


def sparsity_logits(x: Tensor, moments: Tensor) -> Tensor:
    """−erf(m / √(2 s²)) of tokens [..., H] and moments [E, 2, H] → [..., E]."""
    mean, variance = moments.unbind(dim=1)
    spread = 2 * (x.square() @ variance.t())
    return -torch.erf((x @ mean.t()) * spread.clamp_min(torch.finfo(x.dtype).tiny).rsqrt())


@torch.no_grad()
def experts_moments(routers: Sequence[Any]) -> Tensor:
    """Mean and variance over units of what each router's experts multiply a token by, [routers, E, 2, H] in fp32.

    Collective over the ranks that share an expert, and over those that hold others.

    Args:
        routers: of layers with the same numbers of experts and units.
    """
    sharing, holding = routers[0].expert_groups
    weights = [[expert.linear_fc1.weight for expert in router.shown[0].local_experts] for router in routers]
    sums = torch.stack(
        [torch.stack([_sums(weight.detach().float()) for weight in experts]) for experts in weights]
    )  # [routers, experts of this rank, 2, H]
    if sharing.size() > 1:
        torch.distributed.all_reduce(sums, group=sharing)
    if holding.size() > 1:
        gathered = [torch.empty_like(sums) for _ in range(holding.size())]
        torch.distributed.all_gather(gathered, sums, group=holding)
        sums = torch.cat(gathered, dim=1)
    mean, square = (sums / (len(weights[0][0]) * sharing.size())).unbind(dim=2)
    return torch.stack((mean, (square - mean.square()).clamp_min(0)), dim=2)


def _sums(weight: Tensor) -> Tensor:
    return torch.stack((weight.sum(dim=0), weight.square().sum(dim=0)))


class Moments(Plugin):
    """Gives the routers of this rank the moments that a pass over a global batch computes with.

    Args:
        parts: models and groups of this rank.
    """

    has_window: ClassVar[bool] = True

    def __init__(self, parts: StepParts) -> None:
        self.name = MoeX.name
        modules = (module for model in parts.models for module in model.modules())
        self._routers = [module for module in modules if isinstance(module, SparsityRouter)]

    @contextlib.contextmanager
    def effective_weights(self, context: StepContext) -> Iterator[None]:
        """Moments while it is open. Collective over the experts' ranks."""
        if self._routers:
            for router, moments in zip(self._routers, experts_moments(self._routers), strict=True):
                router.moments = moments
        try:
            yield
        finally:
            for router in self._routers:
                router.moments = None
