"""Memory of one rank by part, in bytes: what the training loop's buffers and the kept activations come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.planning.activations import (
    first_activations,
    kept_after_recompute,
    last_activations,
    layer_activations,
)
from sparsecod_megatron.planning.layout import Layout
from sparsecod_megatron.seams.mechanism import configured

Kinds = Sequence[tuple[ParameterKind, int]]
"""Kinds of parameters, and how many of each."""
GIB = 2**30
_FP32 = 4
CUDA_CONTEXT = 2 * GIB
"""Bytes of the CUDA context, NCCL's buffers and cuBLAS's workspaces; about this on Hopper."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by part.

    Attributes:
        weights: what the forward pass reads; FP8 copies included.
        gradients: the buffer that micro-batches are summed in.
        optimizer: fp32 weights (if `weights` are not) and the optimizer's moments.
        activations: kept of all micro-batches in flight, and what recomputing the largest unit brings back.
        logits: the softmax that the cross entropy keeps.
        workspace: CUDA's own, the logits before their softmax, gathered sequences.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def rank_memory(layout: Layout, stage: int) -> RankMemory:
    """Memory of a rank of pipeline stage `stage` (from 0)."""
    kinds = list(layout.stage_parameters(stage))
    activations, logits = _activations(layout, stage)
    return RankMemory(
        weights=_weights(layout, kinds),
        gradients=_gradients(layout, kinds),
        optimizer=_optimizer(layout, kinds),
        activations=activations,
        logits=logits,
        workspace=_workspace(layout, stage),
    )


def parameter_bytes(layout: Layout, kinds: Kinds) -> int:
    """What a rank holds of these parameters: weights, gradients and optimizer."""
    return _weights(layout, kinds) + _gradients(layout, kinds) + _optimizer(layout, kinds)


def _weights(layout: Layout, kinds: Kinds) -> int:
    """In the run's dtype, and what mechanisms keep of each; what is multiplied in FP8 has two copies, one transposed.

    Those copies replace the bf16 one under `fp8_param_gather`. Layers kept in bf16 are counted as if they were not.

    Source: Transformer Engine, pytorch/tensor/float8_tensor.py (data and transpose).
    """
    precision, value = layout.config.precision, layout.bytes_per_value
    mechanisms = configured(layout.config)

    def size(kind: ParameterKind) -> int:
        own = value + sum(mechanism.weight_bytes(kind, value) for mechanism in mechanisms)
        if not (precision.fp8 and kind.fp8):
            return own
        return 2 if precision.fp8_param_gather else own + 2

    return sum(count * layout.on_rank(kind) * size(kind) for kind, count in kinds)


def _gradients(layout: Layout, kinds: Kinds) -> int:
    """Megatron's DDP buffer: fp32 unless `megatron.grad_reduce_in_fp32` is false."""
    in_fp32 = layout.config.megatron.get("grad_reduce_in_fp32", True)
    value = _FP32 if in_fp32 else layout.bytes_per_value
    return sum(count * layout.on_rank(kind) for kind, count in kinds) * value


def _optimizer(layout: Layout, kinds: Kinds) -> int:
    """fp32 weights beside bf16 ones and two moments, sharded over replicas; Muon: one for matrices, not sharded.

    Source: Megatron-Core optimizer/distrib_optimizer.py, optimizer/muon.py.
    """
    main = _FP32 if layout.bytes_per_value < _FP32 else 0
    if layout.config.optimizer.optimizer == "adam":
        return sum(
            count * math.ceil(layout.on_rank(kind) / layout.replicas(kind)) * (main + 2 * _FP32 + _own(layout, kind))
            for kind, count in kinds
        )

    def moments(kind: ParameterKind) -> int:
        return 1 if kind.is_orthogonalised else 2

    return sum(count * layout.on_rank(kind) * (main + moments(kind) * _FP32) for kind, count in kinds)


def _own(layout: Layout, kind: ParameterKind) -> int:
    """Bytes a parameter that mechanisms keep beside the optimizer."""
    return sum(mechanism.optimizer_bytes(kind) for mechanism in configured(layout.config))


def gathered_optimizer(layout: Layout, stage: int) -> int:
    """Bytes of host memory in which the first data-parallel rank of a stage gathers the optimizer for a checkpoint.

    Master weights and both moments in fp32 of all that the rank holds a part of; Muon's are whole on each rank anyway.

    Source: Megatron-Core optimizer/distrib_optimizer.py, `get_parameter_state_dp_zero`.
    """
    if layout.config.optimizer.optimizer != "adam":
        return 0
    return sum(count * layout.on_rank(kind) for kind, count in layout.stage_parameters(stage)) * 3 * _FP32


def _activations(layout: Layout, stage: int) -> tuple[int, int]:
    """(activations, logits) of a stage. What is recomputed comes back when the last layers' own have gone."""
    chunks = [_chunk_activations(layout, stage, chunk) for chunk in range(layout.chunks)]
    in_flight = forwards_in_flight(layout, stage)
    kept = sum(count * kept for count, (kept, _) in zip(in_flight, chunks, strict=True))
    again = max(again for _, again in chunks)
    if stage == 0:
        kept += in_flight[0] * sum(first_activations(layout).values())
    if stage < layout.stages - 1:
        return kept + again, 0
    ends = last_activations(layout)
    total, logits = sum(ends.values()), ends["logits"]
    return kept + max(total, again) - logits, logits


def _chunk_activations(layout: Layout, stage: int, chunk: int) -> tuple[int, int]:
    """(bytes that one micro-batch keeps, bytes by which recompute exceeds them).

    The backward pass goes from the last layer on: when a unit is recomputed, what later layers kept has gone.
    """
    units, whole = layout.recompute.units(layout.layers(stage, chunk))
    unit_input = layout.state_bytes
    # The first norm keeps the unit's input, but for the reference one in bf16, which copies it into fp32.
    shared = unit_input if layout.transformer_engine or layout.bytes_per_value == _FP32 else 0
    sizes = {layer: _layer_bytes(layout, layer) for layer in set(layout.representatives)}
    in_order = []
    for unit in units:
        brought_back = sum(sum(sizes[layout.representatives[layer]]) for layer in unit)
        in_order.append((unit_input, brought_back - shared))
    in_order += [sizes[layout.representatives[layer]] for layer in whole]
    angles = layout.config.data.seq_length // layout.context * layout.model.head_dim * _FP32
    # Those of latent attention are its own.
    kept = most = angles if units and not layout.model.multi_latent_attention else 0
    for remaining, brought_back in in_order:
        kept += remaining
        most = max(most, kept + brought_back)
    return kept, most - kept


def _layer_bytes(layout: Layout, layer: int) -> tuple[int, int]:
    """(bytes that a layer keeps, bytes that selective recompute drops)."""
    saved = layer_activations(layout, layer)
    remaining = sum(kept_after_recompute(layout, layer, saved).values())
    return remaining, sum(saved.values()) - remaining


def forwards_in_flight(layout: Layout, stage: int) -> list[int]:
    """Micro-batches of each chunk whose backward pass has not begun, at most.

    1F1B: stages - stage. Interleaved: the warm-up's 2 · (stages - stage - 1) + (chunks - 1) · stages and one more, over
    the chunks in the order of the schedule (`stages` micro-batches of one chunk, then of the next).

    Source: Narayanan et al., Efficient Large-Scale Language Model Training (arXiv 2104.04473), section 2.2;
    Megatron-Core pipeline_parallel/schedules.py, get_pp_rank_microbatches.
    """
    stages, chunks = layout.stages, layout.chunks
    if chunks == 1:
        return [min(stages - stage, layout.num_microbatches)]
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    total = min(warm_up + 1, layout.num_microbatches * chunks)
    counts = [0] * chunks
    for index in range(total):
        counts[index // stages % chunks] += 1
    return counts


def _workspace(layout: Layout, stage: int) -> int:
    """What lives for a moment only; nothing of CUDA's on CPU."""
    assert layout.model.vocab_size is not None
    gathered = 2 * layout.tokens * layout.model.hidden_size * layout.bytes_per_value
    logits = layout.tokens * layout.model.vocab_size // layout.tensor * layout.bytes_per_value
    context = CUDA_CONTEXT if layout.transformer_engine else 0
    return context + gathered + (logits if stage == layout.stages - 1 else 0)
