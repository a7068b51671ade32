"""Bytes that one rank sends in one step, by process group, and how long the links take for them.

Collectives are counted as rings: an all-gather or a reduce-scatter of B bytes among n ranks sends B (n − 1) / n from
each, an all-reduce twice that. Metrics, norms of gradients and token counts are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsecod_megatron.config.flops import BACKWARD_FACTOR
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.planning.hardware import Gpu
from sparsecod_megatron.planning.latents import gathered_channels
from sparsecod_megatron.planning.layout import Layout

_FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """What one rank sends over one group in one step.

    Attributes:
        group: `tensor`, `context`, `expert`, `expert tensor`, `pipeline`, `data`, `expert data`.
        size: ranks of the group.
        stride: distance between neighbours of the group, in ranks; Megatron puts 8 neighbours on a node.
        pattern: `ring` (collectives), `all-to-all` or `point-to-point`.
        bytes: sent in one step.
    """

    group: str
    size: int
    stride: int
    pattern: str
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        """At the links' full speed. A ring over nodes uses the network cards of all members on a node."""
        inside = max(1, min(self.size, gpu.per_node // self.stride))
        if inside == self.size:
            return self.bytes / gpu.nvlink_bandwidth
        if self.pattern == "ring":
            return self.bytes / min(gpu.nvlink_bandwidth, inside * gpu.network_bandwidth)
        if self.pattern == "all-to-all":
            leaving = (self.size - inside) / (self.size - 1)
            return self.bytes * (leaving / gpu.network_bandwidth + (1 - leaving) / gpu.nvlink_bandwidth)
        return self.bytes / gpu.network_bandwidth


def step_traffic(layout: Layout, stage: int) -> list[Traffic]:
    """What a rank of pipeline stage `stage` sends in one step; groups of one rank are left out."""
    groups = (
        _tensor(layout, stage),
        _context(layout, stage),
        *_expert(layout, stage),
        _pipeline(layout, stage),
        *data_traffic(layout, layout.stage_parameters(stage)),
    )
    return [traffic for traffic in groups if traffic.size > 1 and traffic.bytes > 0]


def _recomputed(layout: Layout, stage: int) -> float:
    """Share of a stage's layers whose forward pass, communication included, is done again."""
    chunks = [layout.layers(stage, chunk) for chunk in range(layout.chunks)]
    again = sum(len(unit) for chunk in chunks for unit in layout.recompute.units(chunk)[0])
    return again / sum(len(chunk) for chunk in chunks)


def _tensor(layout: Layout, stage: int) -> Traffic:
    """Attention, dense MLP and shared expert each sum over the group once forward and once backward.

    With sequence parallelism each sum is a reduce-scatter and an all-gather at the other end of the branch, and the
    backward pass gathers the branch's input once more. The embedding sums forward, the output layer backward. Norms and
    routers, which every rank holds whole, have gradients of its tokens alone, which are summed once a step.

    Source: Korthikanti et al. (arXiv 2205.05198), section 4.2.
    """
    size = layout.tensor
    piece = layout.tokens * layout.model.hidden_size * layout.bytes_per_value * (size - 1) / size
    branches = 0.0
    for layer, count in layout.stage_layers(stage).items():
        has_mlp = not layout.model.is_moe_layer(layer) or layout.model.moe_shared_expert_intermediate_size is not None
        branches += count * (2 if has_mlp else 1)
    forward, backward = 2 * (1 + _recomputed(layout, stage)), 3 if layout.parallel.sequence_parallel else 2
    pieces = branches * (forward + backward)
    if stage == 0:
        pieces += 2
    if stage == layout.stages - 1:
        pieces += backward
    if layout.model.multi_latent_attention and size > 1:  # its input is not gathered, but what is made of it
        share = gathered_channels(layout) / layout.model.hidden_size
        inputs = layout.stage_layers(stage).total() * (1 + _recomputed(layout, stage) + 2)
        pieces += inputs * (share - 1)
    total = pieces * piece * layout.num_microbatches
    if layout.parallel.sequence_parallel:
        whole = sum(kind.total * count for kind, count in layout.stage_parameters(stage) if kind.split == "none")
        total += 2 * whole * _gradient_bytes(layout) * (size - 1) / size
    return Traffic("tensor", size, 1, "ring", total)


def _context(layout: Layout, stage: int) -> Traffic:
    """Keys and values travel round the ring forward, and with their gradients backward.

    Source: Liu et al., Ring Attention (arXiv 2310.01889); Transformer Engine's `p2p`.
    """
    model, size = layout.model, layout.context
    channels = model.query_groups * (model.score_channels + model.value_channels)
    piece = layout.tokens * channels // layout.tensor * layout.bytes_per_value
    passes = BACKWARD_FACTOR + _recomputed(layout, stage)
    total = passes * (size - 1) * piece * layout.stage_layers(stage).total() * layout.num_microbatches
    return Traffic("context", size, layout.tensor, "point-to-point", total)


def _expert(layout: Layout, stage: int) -> tuple[Traffic, Traffic]:
    """Tokens go to their experts and back, forward and backward; tensor-parallel experts gather and scatter them."""
    model, parallel = layout.model, layout.parallel
    experts, tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    row = model.hidden_size * layout.bytes_per_value
    layers = layout.stage_layers(stage).items()
    rows = sum(count * layout.expert_rows(layer) for layer, count in layers if model.is_moe_layer(layer))
    passes = 2 * (2 + _recomputed(layout, stage)) * layout.num_microbatches
    exchanged = passes * rows / tensor * row * (experts - 1) / experts
    gathered = passes * rows * row * (tensor - 1) / tensor
    return (
        Traffic("expert", experts, tensor, "all-to-all", exchanged),
        Traffic("expert tensor", tensor, 1, "ring", gathered),
    )


def _pipeline(layout: Layout, stage: int) -> Traffic:
    """The residual stream to the next stage, its gradient to the one before, for every chunk but the ends."""
    stream = layout.state_bytes
    forward = layout.chunks - (1 if stage == layout.stages - 1 else 0)
    backward = layout.chunks - (1 if stage == 0 else 0)
    total = (forward + backward) * stream * layout.num_microbatches
    return Traffic("pipeline", layout.stages, layout.gpus // layout.stages, "point-to-point", total)


def data_traffic(layout: Layout, kinds: Iterable[tuple[ParameterKind, int]]) -> tuple[Traffic, Traffic]:
    """Gradients are reduce-scattered and weights gathered once a step; Muon, not sharded, all-reduces gradients.

    Args:
        layout: the run.
        kinds: of parameters, and how many of each.
    """
    gradient = _gradient_bytes(layout)
    precision = layout.config.precision
    totals = {"data": 0.0, "expert data": 0.0}
    for kind, count in kinds:
        weight = 1 if precision.fp8_param_gather and kind.fp8 else layout.bytes_per_value
        if layout.config.optimizer.optimizer != "adam":
            weight = gradient
        replicas = layout.replicas(kind)
        group = "expert data" if kind.split == "expert" else "data"
        totals[group] += count * layout.on_rank(kind) * (gradient + weight) * (replicas - 1) / replicas
    parallel = layout.parallel
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    return (
        Traffic("data", layout.gradient_parallel, layout.tensor, "ring", totals["data"]),
        Traffic("expert data", layout.expert_data_parallel, experts, "ring", totals["expert data"]),
    )


def _gradient_bytes(layout: Layout) -> int:
    """Bytes of one gradient, as ranks exchange it."""
    return _FP32 if layout.config.megatron.get("grad_reduce_in_fp32", True) else layout.bytes_per_value
