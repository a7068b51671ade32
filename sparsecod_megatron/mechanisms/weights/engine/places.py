"""Where the weights that a method can mark are: this process's slices of them, and their places in the whole model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsecod_megatron.config.flops import BACKWARD_FACTOR, flops_per_token
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.seams.mechanism import model_at
from sparsecod_megatron.seams.plugin import StepContext, StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.model.matrices import Shard


@dataclass(frozen=True)
class MarkedMatrix:
    """A matrix of the whole model that can be marked, wherever it is.

    Attributes:
        row: of the table of parameters.
        layer: from 0.
        first: place in the whole model of its first weight: the number of weights before it.
    """

    row: ParameterKind
    layer: int
    first: int

    @property
    def size(self) -> int:
        """Number of its weights."""
        return math.prod(self.row.shape)


@dataclass(eq=False)
class Piece:
    """This process's slice of a matrix: what its optimizer steps of it.

    Attributes:
        shard: the matrix's part on this rank.
        index: of the matrix among those of the whole model.
        master: fp32 weights of the slice, flat.
        span: (start, end) of the slice in the flattened shard.
        optimizer: that steps it.
        state_key: what the optimizer keeps its moments under.
        marked: which of them are, bool, flat.
    """

    shard: Shard
    index: int
    master: Tensor
    span: tuple[int, int]
    optimizer: torch.optim.Optimizer
    state_key: Tensor
    marked: Tensor

    @property
    def gradient(self) -> Tensor:
        """Reduced over data-parallel ranks, flat: a view of their buffer."""
        gradient: Tensor = self.shard.parameter.main_grad  # type: ignore[attr-defined]
        return gradient.view(-1)[slice(*self.span)]

    @property
    def moments(self) -> list[Tensor]:
        """Both of Adam's, flat; none before the first update."""
        state = self.optimizer.state.get(self.state_key, {})
        return [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq") if name in state]

    @property
    def group(self) -> dict[str, Any]:
        """Its optimizer's parameter group: learning rate, betas, eps, steps."""
        groups = self.optimizer.param_groups
        return next(group for group in groups if any(part is self.state_key for part in group["params"]))

    @property
    def learning_rate(self) -> float:
        """This step's."""
        return float(self.group["lr"])

    def slice_of(self, shard_values: Tensor) -> Tensor:
        """The slice of something of the shard's shape, flat."""
        return shard_values.reshape(-1)[slice(*self.span)]


class Places:
    """All matrices that can be marked, and what this process holds of them.

    Args:
        parts: what a plugin acts on.
        has_mask: whether a kind of parameter in a layer can be marked.
        marks: whether it can in some layer.

    Attributes:
        matrices: of the whole model, the same on every process.
        shards: of this rank, with the index of their matrix.
        shards_without: of the same kinds in other layers; a checkpoint stacks all layers under one key.
        pieces: that this process steps.
        device: of the weights.
    """

    def __init__(
        self,
        parts: StepParts,
        has_mask: Callable[[ParameterKind, int], bool],
        marks: Callable[[ParameterKind], bool],
    ) -> None:
        from sparsecod_megatron.model.matrices import matrices
        from sparsecod_megatron.parallel.owned_slices import held_slices, working_parts

        table = ParameterTable.of(parts.config)
        self._config, self._has_mask = parts.config, has_mask
        self.matrices = marked_matrices(table, has_mask)
        numbers: dict[tuple[int, str], int] = {}  # of the first matrix of each kind and layer
        for index, matrix in enumerate(self.matrices):
            numbers.setdefault((matrix.layer, matrix.row.name), index)
        all_shards = [shard for model in parts.models for shard in matrices(model, table, parts.groups)]
        self.shards: list[tuple[int, Shard]] = [
            (numbers[shard.matrix.layer, shard.row.name] + _expert(shard), shard)
            for shard in all_shards
            if (shard.matrix.layer, shard.row.name) in numbers
        ]
        self.shards_without = [
            shard for shard in all_shards if marks(shard.row) and (shard.matrix.layer, shard.row.name) not in numbers
        ]
        self.device = next(parts.models[0].parameters()).device
        self.groups = parts.groups
        here = {shard.parameter: (index, shard) for index, shard in self.shards}
        self.pieces = [
            Piece(
                shard=here[parameter][1],
                index=here[parameter][0],
                master=master.view(-1),
                span=span,
                optimizer=part.optimizer,
                state_key=master,
                marked=torch.zeros(master.numel(), dtype=torch.bool, device=master.device),
            )
            for part in working_parts(parts.optimizer)
            for parameter, master, span in held_slices(part, parts.groups)
            if parameter in here
        ]

    def positions(self, number: int) -> Tensor:
        """Place in the whole model of each weight of a piece, int64, flat."""
        piece = self.pieces[number]
        matrix = self.matrices[piece.index]
        whole = torch.arange(matrix.size, device=self.device).view(matrix.row.shape)
        return piece.slice_of(piece.shard.cut(whole)) + matrix.first

    def counted_shards(self) -> Iterator[Shard]:
        """Shards of this rank that no other data-parallel rank counts: sums over all processes have each once."""
        for _, shard in self.shards:
            group = self.groups.expt_dp if shard.row.split == "expert" else self.groups.dp_cp
            if group.rank() == 0:
                yield shard

    def effective_flops_per_token(self, context: StepContext, live: Sequence[float]) -> float:
        """FLOPs of a token, forward and backward, without the products of dead weights, of the model of a step. Local.

        Args:
            context: the step.
            live: number of weights of each matrix that the model computes with.
        """
        config = self._config
        table = replace(ParameterTable.of(config), model=model_at(config, context))
        idle = idle_products(marked_matrices(table, self._has_mask), live)
        return flops_per_token(table, config.data.seq_length) - BACKWARD_FACTOR * 2.0 * idle

    def counts(self, numbers: Sequence[int]) -> Tensor:
        """One number a row, as `selection.largest` takes them."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def idle_products(matrices: Sequence[MarkedMatrix], live: Sequence[float]) -> float:
    """Products of a token with dead weights in a forward pass.

    Args:
        matrices: that have marks.
        live: number of weights of each that the model computes with.
    """
    # A routed expert's products are of the tokens that it gets: its share of a token's.
    return sum(
        (1 - count / matrix.size) * matrix.row.multiplied / matrix.row.copies
        for matrix, count in zip(matrices, live, strict=True)
    )


def marked_matrices(table: ParameterTable, has_mask: Callable[[ParameterKind, int], bool]) -> list[MarkedMatrix]:
    """All that can be marked, layer by layer; each expert's is one of its own. Local, the same everywhere."""
    found: list[MarkedMatrix] = []
    first = 0
    for layer in range(table.model.num_layers):
        for row in table.layer(layer):
            for _ in range(row.copies if has_mask(row, layer) else 0):
                found.append(MarkedMatrix(row, layer, first))
                first += found[-1].size
    return found


def _expert(shard: Shard) -> int:
    """Counted over all ranks; 0 of what is not an expert's."""
    found = re.search(r"\.experts\.(\d+)\.", shard.matrix.name)
    return int(found[1]) if found else 0
