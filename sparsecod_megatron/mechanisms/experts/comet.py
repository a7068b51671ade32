"""Experts chosen by as many binary trees as a token uses experts: COMET's gate in the router's place.

Each of the k trees has E leaves, one for each expert. A node sends a token left with probability S(t), t = v·x + c, and
S the smooth step: 0 below −γ/2, 1 above γ/2, −2 t³/γ³ + 3 t/2γ + ½ between. A leaf is reached with the product p of its
path's probabilities, and has a logit a = w·x + b of its own:

    g = Σ over trees of the softmax over all trees' leaves of (a + log p) = softmax(log Σ over trees of p · exp a)

so logits of E experts say it all, and what follows is any softmax router's: choice, weights, balancing losses. Where
all nodes on a token's paths are decided, at most k experts have g > 0. The entropy loss pushes nodes there:
`entropy_coeff` times the mean over tokens of Σ over trees and leaves of −p log p, scaled as the z-loss is.

Deviations from the published gate. It computes every expert with g > 0, all of them at first; here k are dispatched, as
a router of Megatron-Core's does, and `comet_dropped_mass` says how much of g the others have (with
`moe_router_pre_softmax` it is lost, otherwise the weights are those of the k over their sum). Its local search is left
out: a permutation of experts, learnt by noisy Sinkhorn iterations over the first steps and then frozen, is a second
method beside the gate, with a schedule and an assignment problem of its own. Its initial values are uniform and grow
with γ; here the trees' matrices are drawn as a router's, biases start at 0.

Source: Ibrahim et al., COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search (arXiv
2306.02824), and model/gates/comet.py of its repository, whose ε in logarithms are left out.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.experts.comet_sparsecod import leaf_log_probabilities, tree_logits
from sparsecod_megatron.seams.mechanism import ExportedTensor, LayerSite, Mechanism, Module, RankShape, mixed
from sparsecod_megatron.seams.plugin import Plugin

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.metrics.group import Statistics


@dataclass
class Comet(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "comet"
    shapes_weights: ClassVar[bool] = True

    gamma: float = above(0, 10.0)
    """Width of the region in which a node is undecided; beyond it a node has no gradient. At first t has a standard
    deviation of `init_std.router` · √hidden_size: far below γ all experts are alike, far above it few nodes learn."""
    entropy_coeff: float = at_least(0, 1e-2)
    """On the entropy of the paths; 0 leaves nodes undecided."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No experts, numbers of them that no tree has, and routers that it cannot be."""
        name, model = f"mechanisms.{self.name}", config.model
        if not model.is_moe:
            yield f"model.num_moe_experts: null, but {name} is a router; set it, or remove the mechanism"
            return
        if model.mlp_bias:
            yield f"model.mlp_bias: true, but {name} has no bias; set it to false"
        experts = model.num_moe_experts or 0
        if experts < 2 or experts & (experts - 1):
            yield f"model.num_moe_experts: {experts} is not a power of two, as the leaves of {name} must be; change it"
        if (score := model.moe_router_score_function) != "softmax":
            yield f"model.moe_router_score_function: {score}, but the weights of {name} are a softmax; set softmax"
        if model.moe_router_num_groups is not None:
            groups = f"model.moe_router_num_groups: {model.moe_router_num_groups}"
            yield f"{groups}, but the trees of {name} do not know groups; remove it and moe_router_group_topk"
        for other in config.mechanisms.values():
            if type(other).model_at is not Mechanism.model_at:
                yield f"mechanisms.{other.name}: changes the experts per token, each a tree of {name}; keep one of them"
            elif other is not self and _takes_router(other, model):
                yield f"mechanisms.{other.name}: is a router, and so is {name}; keep one of them"

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """Without the router's matrix."""
        return () if kind.name == "router" else (kind,)

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Hyperplanes of nodes, and logits of leaves, of all trees."""
        if not model.is_moe_layer(layer):
            return
        for part, rows in _rows(model, layer).items():
            at = rf"mlp\.router\.{part}\."
            yield ParameterKind(f"comet_{part}", (rows, model.hidden_size), f"{at}weight", "router", "router")
            yield ParameterKind(f"comet_{part}_bias", (rows,), f"{at}bias", "biases")

    def layers_differ(self, model: ModelConfig) -> bool:
        """Layers with other numbers of experts per token have other numbers of trees."""
        return len({model.topk(layer) for layer in range(model.num_layers) if model.is_moe_layer(layer)}) > 1

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Layers with experts have the router."""
        if site.model.is_moe_layer(site.layer):
            submodules = spec.submodules.mlp.submodules
            router = mixed(TreeRouter, submodules.router)
            submodules.router = functools.partial(router, gamma=self.gamma, entropy_coeff=self.entropy_coeff)
        return spec

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> CometGroup:
        """How decided the trees are."""
        return CometGroup(models)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Both logarithms' arguments and two masks of every branch, of every leaf what logsumexp and entropy read."""
        if not model.is_moe_layer(layer):
            return {}
        trees, experts = model.topk(layer), model.num_moe_experts or 0
        branches, leaves = 2 * trees * (experts - 1), trees * experts
        values = 4 * (2 * branches + leaves * (3 if self.entropy_coeff else 1) + experts)
        return {"comet_router": rank.tokens * (values + 2 * branches)}

    def export(self, model: ModelConfig) -> Module:
        """The trees in the router's place."""
        layers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
        tensors = []
        for part, name in (("nodes", "weight"), ("leaves", "weight"), ("nodes", "bias"), ("leaves", "bias")):
            for layer in layers:
                rows = _rows(model, layer)[part]
                ours, theirs = f"decoder.layers.{layer}.mlp.router.{part}", f"model.layers.{layer}.mlp.gate.{part}"
                shape = (rows, model.hidden_size) if name == "weight" else (rows,)
                tensors.append(ExportedTensor(f"{ours}.{name}", f"{theirs}.{name}", shape))
        return Module(
            code=Path(__file__).with_name("comet_sparsecod.py"),
            settings={"gamma": self.gamma, "entropy_coeff": self.entropy_coeff},
            tensors=tuple(tensors),
            replaced=frozenset(f"decoder.layers.{layer}.mlp.router.weight" for layer in layers),
        )


def _takes_router(mechanism: Mechanism, model: ModelConfig) -> bool:
    row = ParameterKind("router", (model.num_moe_experts or 0, model.hidden_size), r"mlp\.router\.weight")
    return not mechanism.made_of(row, model, model.num_layers - 1)


def _rows(model: ModelConfig, layer: int) -> dict[str, int]:
    """Rows of the trees' two matrices in a layer with experts."""
    trees, experts = model.topk(layer), model.num_moe_experts or 0
    return {"nodes": trees * (experts - 1), "leaves": trees * experts}


class TreeRouter:
    """What a router becomes: its logits are those of trees.

    Every rank holds all trees and sees its own tokens; under sequence parallelism Megatron-Core sums their gradients
    over tensor-parallel ranks as it does those of the matrix that they replace.

    Args:
        config: Megatron-Core's configuration of the layer.
        pg_collection: the run's process groups.
        gamma: width of the region in which a node is undecided.
        entropy_coeff: on the entropy of the paths.
    """

    def __init__(self, config: Any, pg_collection: Any = None, *, gamma: float, entropy_coeff: float) -> None:
        super().__init__(config=config, pg_collection=pg_collection)  # type: ignore[call-arg]
        self.register_parameter("weight", None)  # type: ignore[attr-defined]
        trees, experts = config.moe_router_topk, config.num_moe_experts
        self.nodes = _Projection(config, trees * (experts - 1))
        self.leaves = _Projection(config, trees * experts)
        self.trees, self.gamma, self.entropy_coeff = trees, gamma, entropy_coeff

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S_local, B, E] of tokens [S_local, B, H], in training with the entropy loss in their graph."""
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        paths = leaf_log_probabilities(self.decisions(input), self.gamma)
        logits = tree_logits(paths, self.leaves(input).unflatten(-1, (self.trees, -1)))
        if self.entropy_coeff and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            ranks = self.tp_cp_group.size()  # type: ignore[attr-defined]
            loss = self.entropy_coeff * path_entropy(paths).mean() / ranks
            logits = MoEAuxLossAutoScaler.apply(logits, loss)
        return logits

    def decisions(self, input: Tensor) -> Tensor:
        """t of every node, [S_local, B, trees, E − 1]."""
        return self.nodes(input).unflatten(-1, (self.trees, -1))


class _Projection(torch.nn.Module):
    """W x + b in the router's format, which keeps x and W as they are for the backward pass.

    Args:
        config: Megatron-Core's configuration of the layer.
        rows: of W.
    """

    def __init__(self, config: Any, rows: int) -> None:
        super().__init__()
        self.dtype = torch.float64 if config.moe_router_dtype == "fp64" else torch.float32
        self.weight = torch.nn.Parameter(torch.zeros(rows, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[S_local, B, H] → [S_local, B, rows]."""
        from megatron.core.transformer.moe.moe_utils import router_gating_linear

        return router_gating_linear(x, self.weight, None, self.dtype) + self.bias.to(self.dtype)


def path_entropy(paths: Tensor) -> Tensor:
    """Σ over trees and leaves of −p log p, from log p: [..., trees, E] → [...]."""
    return -(paths.exp() * paths).sum(dim=(-2, -1))


class CometGroup:
    """comet_dropped_mass, comet_path_entropy, comet_decided.

    Means over all tokens of the global batch: the share of g outside the top k, the entropy of a tree's paths over
    log E, and the share of nodes that send a token one way alone.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("comet_dropped_mass", "comet_path_entropy", "comet_decided")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[Any]) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        routers = ((layer.layer_number - 1, getattr(layer.mlp, "router", None)) for layer in layers)
        self._routers: list[tuple[int, Any]] = [each for each in routers if isinstance(each[1], TreeRouter)]

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        def observer(layer: int) -> Any:
            @torch.no_grad()
            def observe(router: Any, args: tuple[Tensor, ...], result: Any) -> None:
                if not in_backward():
                    _observe(sums, layer, router, args[0])

            return observe

        handles = [router.register_forward_hook(observer(layer)) for layer, router in self._routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics; none if its MLP is dense."""
        return {name: means[name] for name in self.names if name in means}


def _observe(sums: LayerAccumulator, layer: int, router: Any, x: Tensor) -> None:
    decisions, shares = router.decisions(x), router.gating(x).softmax(dim=-1)
    kept = shares.topk(router.topk, dim=-1).values.sum(dim=-1)
    entropy = path_entropy(leaf_log_probabilities(decisions, router.gamma)) / math.log(shares.shape[-1])
    sums.add(layer, "comet_dropped_mass", (1 - kept).sum(), kept.numel())
    sums.add(layer, "comet_path_entropy", entropy.sum(), kept.numel() * router.trees)
    sums.add(layer, "comet_decided", (decisions.abs() >= router.gamma / 2).sum(), decisions.numel())
