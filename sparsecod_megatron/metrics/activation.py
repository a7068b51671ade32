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
        counts: dict[int, _Counts] = {}
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
            sinks=getattr(module, "softmax_offset", None),
        )
        sums.add(layer, "first_token_mass", weights.sum(), weights.numel())

    def _add_counts(self, sums: LayerAccumulator, counts: Mapping[int, _Counts]) -> None:
        """Add the shares and numbers of units that `_count_units` counted. Collective."""
        alike: dict[tuple[bool, torch.Size], list[int]] = {}
        for place, units in enumerate(self._units):
            alike.setdefault((units.is_expert, counts[place].numbers.shape), []).append(place)
        for places in alike.values():
            first = self._units[places[0]]
            layers = [self._units[place].layer for place in places]
            counted = torch.stack([counts[place].numbers for place in places])
            rows = counted[..., -1].sum(1)
            elements = rows * (counted.shape[-1] - 2)
            sums.add_layers(layers, "act_nonzero", counted[..., -2].sum(1), elements)
            sums.add_layers(layers, "act_small", elements - counted[..., :-2].sum((1, 2)), elements)
            if first.copies.size() > 1:
                all_reduce_sums(counted, first.copies)
            # Numbers, not shares: one of the ranks that hold the same units adds them.
            mine = 1 if first.copies.rank() == 0 else 0
            times, _, tokens = counted.tensor_split((-2, -1), dim=-1)
            nothing = torch.zeros_like(rows)
            sums.add_layers(layers, "dead_units", mine * (times == 0).sum((1, 2)), nothing)
            always = (times == tokens) & (tokens > 0)
            sums.add_layers(layers, "always_on_units", mine * always.sum((1, 2)), nothing)
        # And one of all ranks of the pipeline stage the 1 that they are divided by.
        own = [layer.layer_number - 1 for layer in self._layers]
        nothing = nothing.new_zeros(len(own))
        ones = torch.full_like(nothing, 1 if self._groups.tp_dp_cp.rank() == 0 else 0)
        for name in ("dead_units", "always_on_units"):
            sums.add_layers(own, name, nothing, ones)


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


class _Counts:
    """What one place has counted in a step.

    Args:
        mlps: whose units it takes.
        units: of each on this rank.
        device: of the activations.

    Attributes:
        numbers: [MLPs, units + 2]: how often each was on; how many activations were not zero; in how many rows.
        of_mlps: the three of each MLP, as views.
        has_zeros: whether some activation was zero, or may be.
    """

    def __init__(self, mlps: int, units: int, device: torch.device) -> None:
        self.numbers = torch.zeros(mlps, units + 2, dtype=torch.float64, device=device)
        self.of_mlps = [(row[:-2], row[-2], row[-1]) for row in self.numbers]
        self.has_zeros = False


class _Scratch:
    """Memory that all places of a step share: on a CPU, touching fresh pages takes longer than all that is computed."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)
        self._found: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two tensors of the shape of `like` [rows, units], which hold anything, and ones, [rows]; all in fp32."""
        if (found := self._found.get(like.shape)) is not None:
            return found
        size, device = like.numel(), like.device
        if self._flat.numel() < 2 * size:
            self._flat = torch.empty(2 * size, device=device)
            self._found.clear()
        pair = self._flat[:size].view(like.shape), self._flat[size : 2 * size].view(like.shape)
        return self._found.setdefault(like.shape, (*pair, torch.ones(len(like), device=device)))


def _count_units(
    units: Units,
    counts: dict[int, _Counts],
    place: int,
    scratch: _Scratch,
    activations: Tensor,
    rows: Any = None,
) -> None:
    """Add the counts of one micro-batch. Collective over `sharing`.

    Args:
        units: the place.
        counts: by place.
        place: which of them.
        scratch: memory for what is between.
        activations: [..., units of this rank].
        rows: of each MLP, where a projection takes several.
    """
    a = activations.flatten(end_dim=-2)
    if place not in counts:
        counts[place] = _Counts(units.mlps, a.shape[-1], a.device)
    counted, on_cpu = counts[place], a.device.type == "cpu"
    # Those of other ranks count too; of one rank each piece has its own, while it is in the caches.
    limits = _limits(units, a) if units.sharing.size() > 1 else None
    sizes = [len(a)] if units.mlps == 1 else [int(size) for size in rows]
    first = 0
    for (times, nonzero, tokens), size in zip(counted.of_mlps, sizes, strict=True):
        end, piece = first + size, CPU_ROWS if on_cpu else max(1, size)
        for start in range(first, end, piece):
            some = a[start : min(start + piece, end)]
            limit = _limits(units, some) if limits is None else limits[start : start + len(some)]
            squares, on, ones = scratch.of(some)
            torch.square(some.float(), out=squares)
            # As numbers, which torch adds in a fraction of the time that it takes to count.
            torch.gt(squares, limit, out=on)
            times += ones @ on
            # SiLU and GELU are hardly ever zero: the smallest square says so in a quarter of the time of counting.
            counted.has_zeros = counted.has_zeros or not on_cpu or not float(squares.amin()) > 0
            nonzero += torch.ne(some, 0, out=on).sum() if counted.has_zeros else some.numel()
            # A padded row has no unit that is on.
            tokens += (limit > 0).sum() if units.is_expert and counted.has_zeros else len(some)
        first = end


def _limits(units: Units, a: Tensor) -> Tensor:
    """Square of what is small of each row, [rows, 1] fp32. Collective over `sharing`.

    Args:
        units: the place.
        a: [rows, units of this rank].
    """
    mean_square = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=torch.float32).square_()
    if len(a) and units.sharing.size() > 1:
        all_reduce_sums(mean_square, units.sharing)
    mean_square /= a.shape[-1] * units.sharing.size()
    return mean_square.mul_(SMALL**2)


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
