"""What the units of MLPs do, how far gates of attention are open, and how much attention rests on the first token.

Definitions, with a [units] the input of an MLP's output projection for one token: the activation, after the gate of a
gated unit, times the router's probability in an expert, and after any mechanism that sets some to zero:

    act_nonzero       share of units and tokens with a ≠ 0
    act_small         share with |a| ≤ 0.01 · rms(a), the root mean square over the token's own units of that MLP
    dead_units        number of units with |a| > 0.01 · rms(a) for no token of the global batch
    always_on_units   number of units with |a| > 0.01 · rms(a) for every token that reached their MLP
    gate_mean         mean of the output gate of attention, sigmoid(logit), over tokens and heads (or channels)
    gate_small        share of these gates below 0.05
    first_token_mass  mean over heads and sampled queries of the attention weight on the first token of the sequence,
                      or of the query's document where documents are packed apart

Routed and shared experts of a layer count together, each (token, expert) pair with that expert's units; an expert's
rows of nothing but zeros are padding and are left out. Under tensor parallelism a token's mean square is summed over
the ranks that share its units, where the hook sees it; counts by unit are summed over the ranks that hold the same
units, for all layers at once when the step ends. A model without gates has no gate statistics.

SiLU and GELU are never zero: there `act_nonzero` is 1 and says nothing of sparsity; `act_small` compares activations.

The queries sampled are every (S / 8)-th of a sequence, the last one included, wherever context parallelism keeps them:
their whole rows of weights are computed again from the queries and keys that the attention got, exactly.

Source: Li et al., The Lazy Neuron Phenomenon (arXiv 2210.06313), for the share of non-zero activations; Qiu et al.,
Gated Attention for Large Language Models (arXiv 2505.06708), for gates and the first token's share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.first_token import SeesKeys, first_token_weights
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.metrics.hooks import in_backward
from sparsecod_megatron.parallel import all_reduce_sums

SMALL = 0.01
"""As a share of the root mean square of a token's activations."""
GATE_SMALL = 0.05
CPU_ROWS = 512
"""Rows that are looked at together on a CPU, so that what is computed of them stays in its caches."""
_UNITS = ("act_nonzero", "act_small", "dead_units", "always_on_units")
_GATES = ("gate_mean", "gate_small")


@dataclass(frozen=True)
class Units:
    """The units of one output projection that this rank holds.

    Attributes:
        layer: 0-based index in the whole model.
        projection: module whose input they are.
        mlps: how many experts' units the projection takes, their rows one after the other; 1 elsewhere.
        sharing: ranks that hold the MLP's other units.
        copies: ranks that hold the same units.
        is_expert: whether a row of zeros is padding.
    """

    layer: int
    projection: torch.nn.Module
    mlps: int
    sharing: ProcessGroup
    copies: ProcessGroup
    is_expert: bool


class ActivationGroup:
    """act_nonzero, act_small, dead_units, always_on_units, gate_mean, gate_small, first_token_mass.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
        attentions: by layer (0-based), what knows which keys its queries see.
        sampling: distance between two queries of a sequence whose attention is looked at.
    """

    names: tuple[str, ...] = (*_UNITS, *_GATES, "first_token_mass")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel], attentions: Mapping[int, SeesKeys], *, sampling: int) -> None:
        self._layers = [layer for model in models for layer in model.decoder.layers]
        self._groups = models[0].pg_collection
        self._units = [units for layer in self._layers for units in _units_of(layer, self._groups)]
        self._attentions, self._sampling = attentions, sampling

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Collective over all ranks but pipeline stages."""
        counts: dict[int, Tensor] = {}
        scratch = _Scratch()
        with contextlib.ExitStack() as stack:
            for place, units in enumerate(self._units):
                before = _observer(partial(_count_units, units, counts, place, scratch))
                stack.callback(units.projection.register_forward_pre_hook(before).remove)
            for layer in self._layers:
                attention, index = layer.self_attention, layer.layer_number - 1
                if attention.config.attention_output_gate:
                    stack.enter_context(_observing_gate(attention, partial(_add_gates, sums, index)))
                attends = partial(self._add_first_token, sums, index)
                handle = attention.core_attention.register_forward_pre_hook(attends, with_kwargs=True)
                stack.callback(handle.remove)
            yield
        if counts:
            self._add_counts(sums, counts)

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        return {name: means[name] for name in self.names if name in means}

    @torch.no_grad()
    def _add_first_token(
        self, sums: LayerAccumulator, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if in_backward():
            return
        weights = first_token_weights(
            self._attentions[layer],
            *args[:2],
            packing=kwargs.get("packed_seq_params"),
            sampling=self._sampling,
            context=self._groups.cp,
        )
        sums.add(layer, "first_token_mass", weights.sum(), weights.numel())

    def _add_counts(self, sums: LayerAccumulator, counts: dict[int, Tensor]) -> None:
        """Add the shares and numbers of units that `_count_units` counted. Collective."""
        device = next(iter(counts.values())).device
        for place, counted in counts.items():
            layer, elements = self._units[place].layer, counted[:, -1].sum() * (counted.shape[1] - 2)
            sums.add(layer, "act_nonzero", counted[:, -2].sum(), elements)
            sums.add(layer, "act_small", elements - counted[:, :-2].sum(), elements)
        for is_expert in (False, True):
            places = [place for place, units in enumerate(self._units) if units.is_expert is is_expert]
            if not places:
                continue
            copies = self._units[places[0]].copies
            packed = torch.cat([counts[place].flatten() for place in places])
            if copies.size() > 1:
                all_reduce_sums(packed, copies)
            # Numbers, not shares: one of the ranks that hold the same units adds them.
            mine = 1 if copies.rank() == 0 else 0
            for place, part in zip(places, packed.split([counts[place].numel() for place in places]), strict=True):
                times, _, tokens = part.view_as(counts[place]).tensor_split((-2, -1), dim=1)
                layer = self._units[place].layer
                sums.add(layer, "dead_units", mine * (times == 0).sum(), 0)
                sums.add(layer, "always_on_units", mine * ((times == tokens) & (tokens > 0)).sum(), 0)
        # And one of all ranks of the pipeline stage the 1 that they are divided by.
        count, nothing = 1 if self._groups.tp_dp_cp.rank() == 0 else 0, torch.zeros((), device=device)
        for layer in self._layers:
            for name in ("dead_units", "always_on_units"):
                sums.add(layer.layer_number - 1, name, nothing, count)


def _units_of(layer: TransformerLayer, groups: Any) -> Iterator[Units]:
    """Where the activations of a layer's MLP, or of its experts, are projected."""
    index, mlp = layer.layer_number - 1, layer.mlp
    if not isinstance(mlp, MoELayer):
        yield Units(index, mlp.linear_fc2, 1, groups.tp, groups.dp_cp, is_expert=False)
        return
    expert = partial(Units, sharing=groups.expt_tp, copies=groups.expt_dp, is_expert=True)
    local = getattr(mlp.experts, "local_experts", None)
    if local is None:  # grouped: one projection for all of them
        yield expert(index, mlp.experts.linear_fc2, mlp.num_local_experts)
    else:
        yield from (expert(index, each.linear_fc2, 1) for each in local)
    if mlp.shared_experts is not None:
        yield Units(index, mlp.shared_experts.linear_fc2, 1, groups.tp, groups.dp_cp, is_expert=False)


def _observer(observe: Callable[..., None]) -> Callable[..., None]:
    """A hook before a module that hands its inputs on, once where recompute runs it twice."""

    @torch.no_grad()
    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not in_backward():
            observe(*args)

    return hook


class _Scratch:
    """Memory that all places of a step share: on a CPU, touching fresh pages takes longer than all that is computed."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of the shape of `like`, in fp32, that hold anything."""
        size = like.numel()
        if self._flat.numel() < 2 * size or self._flat.device != like.device:
            self._flat = torch.empty(2 * size, device=like.device)
        return self._flat[:size].view(like.shape), self._flat[size : 2 * size].view(like.shape)


def _count_units(
    units: Units,
    counts: dict[int, Tensor],
    place: int,
    scratch: _Scratch,
    activations: Tensor,
    rows: Any = None,
) -> None:
    """Add the counts of one micro-batch. Collective over `sharing`.

    Args:
        units: the place.
        counts: by place, [MLPs, units of this rank + 2]: how often each was on; how many activations were not zero;
            in how many rows.
        place: which of them.
        scratch: memory for what is between.
        activations: [..., units of this rank].
        rows: of each MLP, where a projection takes several.
    """
    a = activations.detach().flatten(end_dim=-2)
    mean_square = torch.linalg.vector_norm(a, dim=-1, dtype=torch.float32).square_()
    if len(a) and units.sharing.size() > 1:
        all_reduce_sums(mean_square, units.sharing)
    mean_square /= a.shape[-1] * units.sharing.size()
    limits = SMALL**2 * mean_square
    if place not in counts:
        counts[place] = torch.zeros(units.mlps, a.shape[-1] + 2, dtype=torch.float64, device=a.device)
    sizes = [len(a)] if units.mlps == 1 else [int(size) for size in rows]
    for total, part, bound in zip(counts[place], a.split(sizes), limits.split(sizes), strict=True):
        piece = CPU_ROWS if a.device.type == "cpu" else max(1, len(part))
        for some, limit in zip(part.split(piece), bound.split(piece), strict=True):
            squares, on = scratch.pair(some)
            torch.square(some.float(), out=squares)
            # As numbers, which torch adds in a fraction of the time that it takes to count.
            torch.gt(squares, limit[:, None], out=on)
            total[:-2] += limit.new_ones(len(limit)) @ on
            total[-2] += torch.ne(some, 0, out=on).sum()
        # A padded row has no unit that is on.
        total[-1] += (bound > 0).sum() if units.is_expert else len(bound)


@contextlib.contextmanager
def _observing_gate(attention: Any, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `observe` with the logits of the output gate, which a method applies, not a module with hooks."""
    apply = attention._apply_output_gate

    def observed(x: Tensor, gate: Tensor) -> Tensor:
        if not in_backward():
            observe(gate.detach())
        gated: Tensor = apply(x, gate)
        return gated

    attention._apply_output_gate = observed
    try:
        yield
    finally:
        del attention._apply_output_gate


@torch.no_grad()
def _add_gates(sums: LayerAccumulator, layer: int, logits: Tensor) -> None:
    gates = torch.sigmoid(logits.float())
    sums.add(layer, "gate_mean", gates.sum(), gates.numel())
    sums.add(layer, "gate_small", (gates < GATE_SMALL).sum(), gates.numel())
