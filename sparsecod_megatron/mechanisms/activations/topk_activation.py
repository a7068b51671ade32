"""Only the k largest units of a token keep their activation in an MLP: exactly, over all tensor-parallel ranks.

With a the activation [..., F] before the output projection, a' = a where |a| is at least the k-th largest of the
token's |a|, else 0. Gradients flow through the kept units alone, and k is the same in training and evaluation. Units
that tie with the k-th are all kept (in bf16 a few, which `topk_ties` counts), and a zero stays zero whether it is among
the k or not. In a mixture of experts each expert, shared ones too, keeps k of its own. The products stay dense: nothing
is saved in training.

Under tensor parallelism every rank gathers the others' k largest values, k · TP numbers per token, to know the k-th of
all; the threshold is a constant of the backward pass.

Source: Li et al., The Lazy Neuron Phenomenon (arXiv 2210.06313), section 4; there of ReLU, here of any activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.seams.mechanism import LayerSite, Mechanism, Module, RankShape, mixed

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class TopKActivation(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "topk_activation"
    has_choices: ClassVar[bool] = True

    k: int = at_least(1, 64)
    """Units that a token keeps in each MLP; with the MLP's width, or more, it keeps all."""
    k_per_layer: list[int] | None = None
    """One for each layer, in place of `k`."""

    def units(self, layer: int) -> int:
        """k of layer `layer` (from 0)."""
        return self.k_per_layer[layer] if self.k_per_layer else self.k

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A list of another length, and experts that run as one product."""
        layers, key = config.model.num_layers, self.key("k_per_layer")
        if self.k_per_layer is not None and len(self.k_per_layer) != layers:
            yield f"{key}: {len(self.k_per_layer)} entries for model.num_layers={layers}; give one per layer"
        if self.k_per_layer is not None and min(self.k_per_layer, default=1) < 1:
            yield f"{key}: {min(self.k_per_layer)} is below 1; raise it"
        for field in ("moe_grouped_gemm", "moe_shared_expert_overlap", "use_te_activation_func"):
            if config.megatron.get(field):
                yield f"megatron.{field}: true, but mechanisms.{self.name} acts between an MLP's products; remove it"

    def transformer_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Experts one by one: grouped ones have no place between their products."""
        return {"moe_grouped_gemm": False} if model.is_moe else {}

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Output projections that first let go of the smaller activations."""
        for mlp, width in _mlps(spec.submodules.mlp, site.model, site.layer):
            if self.units(site.layer) < width:
                # A copy: routed and shared experts are built from one list of modules.
                limited = _limited(mlp.submodules.linear_fc2, self.units(site.layer))
                mlp.submodules = replace(mlp.submodules, linear_fc2=limited)
        return spec

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> ActiveUnits:
        """Share of units that are not zero, and units kept for a tie."""
        return ActiveUnits(models)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Which units were kept; and ReLU's own output, which is now another than the projection's input."""
        value = 1 + (rank.value_bytes if model.activation == "relu" else 0)
        k, saved = self.units(layer), {}
        if not model.is_moe_layer(layer):
            width = model.ffn_hidden_size
            return {"mlp_topk": rank.tokens * width // rank.tensor * value} if k < width else {}
        if k < (width := model.expert_ffn_hidden_size):
            saved["expert_topk"] = rank.expert_rows * width // rank.expert_tensor
        if k < (width := model.moe_shared_expert_intermediate_size or 0):
            saved["shared_expert_topk"] = rank.tokens * width // rank.tensor * value
        return saved

    def made_small(self, model: ModelConfig, small: ModelConfig) -> TopKActivation:
        """The same share of the units."""
        share = small.ffn_hidden_size / model.ffn_hidden_size
        units = [max(1, round(self.units(layer) * share)) for layer in range(min(small.num_layers, model.num_layers))]
        units += [units[-1]] * (small.num_layers - len(units))
        return replace(self, k=units[0], k_per_layer=units)

    def export(self, model: ModelConfig) -> Module:
        """The same weights, and the same choice of units before the down projections."""
        units = [self.units(layer) for layer in range(model.num_layers)]
        settings = {"k": self.k, "k_per_layer": units if self.k_per_layer else None}
        return Module(code=Path(__file__).with_name("topk_activation_sparsecod.py"), settings=settings)


class KeepsLargest:
    """What an output projection becomes: its input loses all but the k largest of each token.

    Args:
        *arguments: the projection's.
        k: units that a token keeps.
        tp_group: ranks that share the units, as MLPs of every kind pass them.
        **options: the projection's others.
    """

    def __init__(self, *arguments: Any, k: int, tp_group: Any, **options: Any) -> None:
        super().__init__(*arguments, tp_group=tp_group, **options)  # type: ignore[call-arg]
        assert tp_group is not None, "an MLP says which ranks share its units"
        self.k, self.units_group = k, tp_group
        self.observe: Callable[[Tensor, Tensor], None] | None = None
        # In front of all other hooks, which so see what is multiplied.
        self.register_forward_pre_hook(_keep)  # type: ignore[attr-defined]


def _keep(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    kept, smallest = keep_largest(inputs[0], module.k, module.units_group)
    if module.observe is not None:
        module.observe(kept.detach(), smallest)
    return (kept, *inputs[1:])


def keep_largest(x: Tensor, k: int, group: torch.distributed.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """x [..., units of this rank] with 0 where |x| is below the k-th largest of all ranks' units, and that, [..., 1].

    Collective over `group`.

    Args:
        x: activations.
        k: units to keep, at least 1 and below the number of all.
        group: ranks that hold the other units; None holds all here.
    """
    size = 1 if group is None else group.size()
    magnitudes = x.detach().abs()
    largest = magnitudes.topk(min(k, x.shape[-1]), dim=-1, sorted=False).values
    if size > 1:
        gathered = [torch.empty_like(largest) for _ in range(size)]
        torch.distributed.all_gather(gathered, largest.contiguous(), group=group)
        largest = torch.cat(gathered, dim=-1).topk(k, dim=-1, sorted=False).values
    threshold = largest.amin(dim=-1, keepdim=True)
    return torch.where(magnitudes >= threshold, x, 0), threshold


def _limited(linear: Any, k: int) -> ModuleSpec:
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(linear, ModuleSpec):
        return ModuleSpec(mixed(KeepsLargest, linear.module), {**linear.params, "k": k}, linear.submodules)
    return ModuleSpec(mixed(KeepsLargest, linear), {"k": k})


def _mlps(spec: ModuleSpec, model: ModelConfig, layer: int) -> Iterator[tuple[ModuleSpec, int]]:
    """Spec and width of each MLP of a layer."""
    if not model.is_moe_layer(layer):
        yield spec, model.ffn_hidden_size
        return
    yield spec.submodules.experts, model.expert_ffn_hidden_size
    if model.moe_shared_expert_intermediate_size is not None:
        yield spec.submodules.shared_experts, model.moe_shared_expert_intermediate_size


class ActiveUnits:
    """active_units, topk_ties.

    Over all tokens and experts, the share of units of limited MLPs that are not zero, and the mean number of units that
    a token keeps beyond k because they tie with its k-th.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("active_units", "topk_ties")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[Any]) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self._places = [
            (layer.layer_number - 1, module)
            for layer in layers
            for module in layer.modules()
            if isinstance(module, KeepsLargest)
        ]

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Count in every training forward pass inside the block. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        def observe(layer: int, module: KeepsLargest, kept: Tensor, smallest: Tensor) -> None:
            if in_backward():
                return
            sums.add(layer, "active_units", kept.count_nonzero(), kept.numel())
            # A token with fewer than k units that are not zero has none too many. Each rank counts its own units, for
            # as many ranks as there are, so that the sum over ranks is the number of units times their number.
            full = smallest.squeeze(-1) > 0
            beyond = module.units_group.size() * kept.count_nonzero(dim=-1) - module.k
            sums.add(layer, "topk_ties", (beyond * full).sum(), full.numel())

        for layer, module in self._places:
            module.observe = partial(observe, layer, module)
        try:
            yield
        finally:
            for _, module in self._places:
                module.observe = None

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none where all units are kept."""
        return {name: means[name] for name in self.names if name in means}
