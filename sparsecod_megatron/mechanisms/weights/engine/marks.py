"""Marked weights: a bit for each weight where the optimizer's slice of it is, chosen at some steps, and what it means.

Marks lie over all data-parallel ranks as masters and moments do, a byte for each weight, and whole in checkpoints,
beside the weight that they belong to, so that any layout loads them. What a step chooses counts from the step's own
gradient on, but becomes the marks only if the step has an update; else the next step chooses again.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.places import Piece, Places
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.plugin import STATE_PREFIX, Plugin, StepContext, StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.model.matrices import Shard

COUNTERS = "counters"
"""Key of the numbers that the checkpoint keeps beside the marks: seed, two flags, steps, Σ live weights, live ones."""


class Marks(Plugin):
    """Chooses marks and keeps them; a subclass says when, which, and what they do.

    Args:
        settings: of the run.
        parts: what it acts on.

    Attributes:
        places: of the weights.
        seed: of the run's masks; a checkpoint's is kept, whatever `train.seed` says.
        live: number of weights of each matrix that the model computes with.
        has_zeros: whether marked weights are zeros now.
        flips: marks that the last choice changed, summed over all processes; None before the first.
        is_observed: whether a statistic asks for this step's dead neurons.
        dead_neurons: (layer, dead, all) of the MLP inputs that this rank counts, at an observed step.
    """

    def __init__(self, settings: WeightMechanism, parts: StepParts) -> None:
        self.name, self.settings = settings.name, settings
        self.places = Places(parts, settings.has_mask, settings.marks)
        self.table = ParameterTable.of(parts.config)
        self.seed = parts.config.train.seed
        self.live: list[float] = [matrix.size for matrix in self.places.matrices]
        self.has_zeros = False
        self.flips: Tensor | None = None
        self.is_observed = False
        self.dead_neurons: list[tuple[int, Tensor, int]] = []
        self._pending: list[Tensor] | None = None
        self._is_owed, self._steps, self._live_steps = False, 0, 0.0
        self._restored = False

    def initial_marks(self, index: int, shard: Shard) -> Tensor | None:
        """Marks of a fresh matrix's part on this rank, bool; None is none. Local."""
        return None

    def is_due(self, context: StepContext) -> bool:
        """Whether this step chooses again; a pure function of the step."""
        return False

    def chosen(self, context: StepContext) -> list[Tensor]:
        """New marks of each piece, bool. Collective over all processes."""
        raise NotImplementedError

    def change_gradient(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """Change the gradient of a piece, before its norm is taken. Local."""

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """Change what the optimizer has just stepped of a piece. Local."""

    @torch.no_grad()
    def weights_replaced(self) -> None:
        """Mark fresh weights; the marks of a checkpoint stay, and its weights are zero already where they must be."""
        if not self._restored:
            drawn = {shard.parameter: self.initial_marks(index, shard) for index, shard in self.places.shards}
            for piece in self.places.pieces:
                marks = drawn[piece.shard.parameter]
                piece.marked = torch.zeros_like(piece.marked) if marks is None else piece.slice_of(marks).clone()
                masking.zero_(piece.master, piece.marked)
            for parameter, marks in drawn.items():
                if marks is not None:
                    masking.zero_(parameter.data, marks)
            self.has_zeros = any(marks is not None for marks in drawn.values())

    @torch.no_grad()
    def on_gradients(self, context: StepContext) -> None:
        """Choose, if it is time, and change gradients."""
        if context.step == 1:  # the marks may be another run's, which counted its own steps
            self._steps, self._live_steps = 0, 0.0
        if self.is_observed:
            self.dead_neurons = dead_neurons(self.places)
        self._pending = self.chosen(context) if self._is_owed or self.is_due(context) else None
        for piece, marks in self._pieces():
            self.change_gradient(piece, marks, context)

    @torch.no_grad()
    def after_update(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """Change masters and moments."""
        for piece, marks in self._pieces():
            if piece.optimizer is optimizer:
                self.change_weights(piece, marks, context)

    @torch.no_grad()
    def step_ended(self, context: StepContext, *, updated: bool) -> None:
        """Keep what was chosen if it was used."""
        if self._pending is not None and updated:
            flips = torch.zeros((), dtype=torch.int64, device=self.places.device)
            for piece, marks in self._pieces():
                flips += (piece.marked != marks).sum()
                piece.marked = marks
            self.flips = flips
            dist.all_reduce(self.flips)
            self.live = self.settings.live_counts(self.table, context)
            self.has_zeros = self.settings.is_zeroing(context)
        self._is_owed = self._pending is not None and not updated
        self._pending = None
        self._steps, self._live_steps = self._steps + 1, self._live_steps + sum(self.live)

    def metrics(self, context: StepContext) -> dict[str, float]:
        """Share of weights with a mask that live, parameters of the model that lived on average, FLOPs without dead."""
        matrices = self.places.matrices
        total, others = sum(matrix.size for matrix in matrices), self.table.count().total
        found = {
            "live_share": sum(self.live) / total,
            "mean_live_parameters": others - total + self._live_steps / max(self._steps, 1),
            "effective_flops_per_token": self.places.effective_flops_per_token(context, self.live),
        }
        return found if self.flips is None else {**found, "mask_flips": self.flips.item() / total}

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Marks, cut as their weights are, and the counters. Collective over all processes."""
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map

        shards = [*(shard for _, shard in self.places.shards), *self.places.shards_without]
        places = get_param_id_to_sharded_param_map(model_state, [shard.parameter for shard in shards])
        owned = {piece.shard.parameter: piece for piece in self.places.pieces}
        state: dict[str, Any] = {}
        for index, shard in enumerate(shards):
            marked = torch.zeros(shard.parameter.numel(), dtype=torch.uint8, device=shard.parameter.device)
            if (piece := owned.get(shard.parameter)) is not None:
                marked[slice(*piece.span)] = piece.marked.to(torch.uint8)
            group = self.places.groups.expt_dp if shard.row.split == "expert" else self.places.groups.dp_cp
            dist.all_reduce(marked, dist.ReduceOp.MAX, group=group)
            place = places[index]
            dtype = {"dtype": torch.uint8} if hasattr(place, "dtype") else {}  # a factory's parts have it
            state[shard.matrix.name] = dataclasses.replace(
                place, key=f"{STATE_PREFIX}{self.name}.{place.key}", data=marked.view_as(shard.parameter), **dtype
            )
        flags = [float(self.has_zeros), float(self._is_owed)]
        numbers = [float(self.seed), *flags, float(self._steps), self._live_steps, *self.live]
        state[COUNTERS] = ShardedTensor.from_rank_offsets(
            f"{STATE_PREFIX}{self.name}.{COUNTERS}",
            torch.tensor(numbers, dtype=torch.float64),
            replica_id=dist.get_rank(),
        )
        return state

    def restore(self, tensors: dict[str, Any]) -> None:
        """The marks of a checkpoint, whatever was drawn."""
        self._restored = True
        numbers = tensors[COUNTERS].tolist()
        self.seed, self.has_zeros, self._is_owed = round(numbers[0]), bool(numbers[1]), bool(numbers[2])
        self._steps, self._live_steps, self.live = round(numbers[3]), numbers[4], numbers[5:]
        for piece in self.places.pieces:
            marks = tensors[piece.shard.matrix.name].to(piece.marked.device)
            piece.marked = piece.slice_of(marks).bool()

    def _pieces(self) -> list[tuple[Piece, Tensor]]:
        """Each with the marks that count in this step."""
        pieces = self.places.pieces
        marks = [piece.marked for piece in pieces] if self._pending is None else self._pending
        return list(zip(pieces, marks, strict=True))


class ZeroedWeights(Marks):
    """Marked weights are zeros, with moments of zero; one whose mark is taken away starts at zero too."""

    def change_gradient(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """None for what is dead before or after the step, so that neither norm nor moments see it."""
        if self.has_zeros or self.settings.is_zeroing(context):
            masking.zero_(piece.gradient, self._touched(piece, marks))

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """Only where marks change: without gradient and moments, AdamW leaves a zero where it is."""
        if marks is not piece.marked and self.settings.is_zeroing(context):
            touched = self._touched(piece, marks)
            for values in (piece.master, *piece.moments):
                masking.zero_(values, touched)

    def _touched(self, piece: Piece, marks: Tensor) -> Tensor:
        return marks | piece.marked if self.has_zeros and marks is not piece.marked else marks


def dead_neurons(places: Places) -> list[tuple[int, Tensor, int]]:
    """Layer, neurons with a row of zeros, and neurons of each MLP input matrix that this rank counts. Local."""
    found = []
    for shard in places.counted_shards():
        if shard.row.init == "mlp_input":
            rows = (shard.parameter.detach() == 0).all(dim=1)
            neurons = rows.view(shard.row.stacked, -1).any(dim=0)
            found.append((shard.matrix.layer, neurons.sum(), neurons.numel()))
    return found
