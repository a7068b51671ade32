"""Coupled weights that live or die together: an MLP's neuron, or the query heads of one key head.

A neuron is its row in the MLP's input matrix (gate and up, where there are two) and its column in the output matrix; a
head group is the rows of its queries, key and value and the columns that read its output. Every expert has its own.
Groups are counted over the whole model, so that a vector with one number for each is the same on every process.

Source: Ma et al., LLM-Pruner (arXiv 2305.11627) names these couplings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.mechanisms.weights.engine.places import MarkedMatrix, Piece, Places

PATTERN_KINDS = {"neuron": ("mlp_input", "mlp_output"), "head": ("qkv", "attention_output")}
"""Kinds of matrices in which each pattern has groups."""


@dataclass(frozen=True)
class Block:
    """The groups of one MLP, expert or attention.

    Attributes:
        layer: from 0.
        first: number of its first group.
        count: of its groups.
        size: weights of a group.
    """

    layer: int
    first: int
    count: int
    size: int


def model_blocks(matrices: list[MarkedMatrix], model: ModelConfig, pattern: str) -> tuple[list[Block], list[int]]:
    """All blocks of a model, and the block of each matrix. Local, the same everywhere.

    Args:
        matrices: of the engine, in its order.
        model: its shape.
        pattern: of `PATTERN_KINDS`.
    """
    numbers: dict[tuple[int, str, int], int] = {}
    sizes: list[int] = []
    counts: list[int] = []
    of_matrix, seen = [], dict[tuple[int, str], int]()
    for matrix in matrices:
        copy = seen[matrix.layer, matrix.row.name] = seen.get((matrix.layer, matrix.row.name), -1) + 1
        family = matrix.row.name.removesuffix("_input").removesuffix("_output")
        place = (matrix.layer, "attention" if pattern == "head" else family, copy)
        number = numbers.setdefault(place, len(numbers))
        if number == len(sizes):
            sizes.append(0)
            counts.append(model.query_groups if pattern == "head" else matrix.row.shape[0] // matrix.row.stacked)
        sizes[number] += matrix.size // counts[number]
        of_matrix.append(number)
    blocks, first = [], 0
    for (layer, _, _), count, size in zip(numbers, counts, sizes, strict=True):
        blocks.append(Block(layer, first, count, size))
        first += count
    return blocks, of_matrix


@dataclass(frozen=True)
class Rectangle:
    """Whole rows of a piece, or the part of one that a slice cuts: groups go along one axis, so each has one number.

    Attributes:
        start: where it begins in the piece.
        shape: (rows, columns).
        axis: along which groups change.
        ids: group of each row, or of each column, int64.
    """

    start: int
    shape: tuple[int, int]
    axis: int
    ids: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Its part of a piece's flat values, [rows, columns]: a view."""
        return values[self.start : self.start + self.shape[0] * self.shape[1]].view(self.shape)

    def line(self, values: Tensor) -> Tensor:
        """One of each group's values, where all are equal: [rows, 1] or [1, columns]."""
        return self.of(values).narrow(1 - self.axis, 0, 1)

    def spread(self, values: Tensor) -> Tensor:
        """The value of each group, [groups], where its weights are: [rows, 1] or [1, columns]."""
        return values[self.ids].unsqueeze(1 - self.axis)


class Groups:
    """Which group each weight of this process is in.

    Args:
        places: of the weights.
        model: its shape.
        pattern: of `PATTERN_KINDS`.

    Attributes:
        blocks: of the whole model.
        of_matrix: the block of each matrix.
        number: of groups of the whole model.
        rectangles: that each piece consists of.
        sizes: weights of each group, [groups].
    """

    def __init__(self, places: Places, model: ModelConfig, pattern: str) -> None:
        self._places = places
        self.blocks, self.of_matrix = model_blocks(places.matrices, model, pattern)
        self.number = self.blocks[-1].first + self.blocks[-1].count
        self.rectangles = {piece: self._rectangles(piece) for piece in places.pieces}
        sizes = [size for block in self.blocks for size in [block.size] * block.count]
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=places.device)

    def sums(self, values: Iterable[Tensor]) -> Tensor:
        """Sum of a value of each weight over each group, [groups] fp32. Collective over all processes.

        Args:
            values: of each piece, flat.
        """
        return self._total(values, lambda part, axis: part.sum(axis, dtype=torch.float32))

    def norms(self) -> Tensor:
        """L2 norm of each group's fp32 weights, [groups]. Collective over all processes."""
        masters = (piece.master for piece in self._places.pieces)
        return self._total(masters, lambda part, axis: torch.linalg.vector_norm(part, dim=axis).square()).sqrt()

    def spread(self, values: Tensor) -> list[Tensor]:
        """The value of each weight's group, piece by piece, flat. Local.

        Args:
            values: [groups].
        """
        return [
            torch.cat([part.spread(values).expand(part.shape).reshape(-1) for part in parts])
            for parts in self.rectangles.values()
        ]

    def _total(self, values: Iterable[Tensor], reduced: Callable[[Tensor, int], Tensor]) -> Tensor:
        total = torch.zeros(self.number, dtype=torch.float32, device=self._places.device)
        for parts, value in zip(self.rectangles.values(), values, strict=True):
            for part in parts:
                total.index_add_(0, part.ids, reduced(part.of(value), 1 - part.axis))
        dist.all_reduce(total)
        return total

    def whole_ids(self, index: int) -> Tensor:
        """The group of each weight of a whole matrix, flat, on the CPU. Local."""
        return self._ids_of(index, torch.arange(self._places.matrices[index].size))

    def _rectangles(self, piece: Piece) -> list[Rectangle]:
        matrix = self._places.matrices[piece.index]
        place = piece.shard.cut(torch.arange(matrix.size).view(matrix.row.shape))
        axis = 1 if matrix.row.init in ("mlp_output", "attention_output") else 0
        ids = self._ids_of(piece.index, place.select(1 - axis, 0)).to(self._places.device)
        (start, end), columns = piece.span, place.shape[1]
        # Up to where the first whole row begins, to where the last one ends, and the rest.
        first = min(-(-start // columns) * columns, end)
        last = max(end // columns * columns, first)
        found = []
        for begin, stop in ((start, first), (first, last), (last, end)):
            if begin < stop:
                row, column = divmod(begin, columns)
                shape = (-(-stop // columns) - row, min(stop - begin, columns))
                part = ids[row : row + shape[0]] if axis == 0 else ids[column : column + shape[1]]
                found.append(Rectangle(begin - start, shape, axis, part))
        return found

    def _ids_of(self, index: int, place: Tensor) -> Tensor:
        matrix, block = self._places.matrices[index], self.blocks[self.of_matrix[index]]
        rows, columns = matrix.row.shape
        if matrix.row.init == "mlp_input":
            found = place // columns % block.count
        elif matrix.row.init == "mlp_output":
            found = place % columns
        elif matrix.row.init == "qkv":
            found = place // columns // (rows // block.count)
        else:
            found = place % columns // (columns // block.count)
        return found + block.first


def smallest_groups(scores: Tensor, blocks: list[Block], dead: list[int], *, is_global: bool) -> Tensor:
    """Marks of the groups with the smallest scores, [groups] bool; of equal ones the first. Local.

    Args:
        scores: [groups], the same on every process.
        blocks: of the model.
        dead: how many of each block; all together where the scope is global.
        is_global: whether groups of all blocks compete.
    """
    marks = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if is_global:
        marks[scores.argsort(stable=True)[: sum(dead)]] = True
        return marks
    for block, count in zip(blocks, dead, strict=True):
        order = scores[block.first : block.first + block.count].argsort(stable=True)
        marks[block.first + order[:count]] = True
    return marks
