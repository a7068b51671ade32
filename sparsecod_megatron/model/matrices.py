"""The matrices that a rank holds a part of: their names in the whole model, and how a whole one is cut into shards.

What is drawn by name (weights, masks) is so the same under every layout: a rank draws the whole matrix from a generator
of that name, and keeps its shard.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable


@dataclass(frozen=True)
class WholeMatrix:
    """One matrix of the whole model.

    Attributes:
        name: unique in the model, whatever the layout.
        row: of the table of parameters.
        layer: from 0; 0 outside of layers.
    """

    name: str
    row: ParameterKind
    layer: int

    @property
    def init(self) -> str:
        """The field of InitStdConfig that it is drawn by."""
        assert self.row.init is not None, f"no initialisation for {self.name}"
        return self.row.init

    @property
    def fan_in(self) -> int:
        """Its input size in the whole model."""
        return self.row.shape[1]


@dataclass(frozen=True)
class Shard:
    """This rank's part of a matrix.

    Attributes:
        parameter: that holds it, in one of this rank's model chunks.
        matrix: the whole one.
        group: ranks that share it.
    """

    parameter: torch.nn.Parameter
    matrix: WholeMatrix
    group: torch.distributed.ProcessGroup

    @property
    def row(self) -> ParameterKind:
        """Its row in the table of parameters."""
        return self.matrix.row

    @property
    def whole_shape(self) -> list[int]:
        """The whole matrix's."""
        shape = list(self.parameter.shape)
        if self.row.dimension is not None:
            shape[self.row.dimension] *= self.group.size()
        return shape

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of something of the whole matrix's shape; of each of the matrices stacked in it. Local."""
        dimension, parts = self.row.dimension, self.group.size()
        if dimension is None:
            return whole
        return torch.cat(
            whole.chunk(parts * self.row.stacked, dim=dimension)[self.group.rank() :: parts], dim=dimension
        )


def named_generator(name: str, device: torch.device) -> torch.Generator:
    """A generator whose numbers depend on a name (and the kind of device) only."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


def matrices(chunk: GPTModel, table: ParameterTable, groups: ProcessGroupCollection) -> Iterator[Shard]:
    """Every matrix of a model chunk that has weights on this rank. Local.

    Args:
        chunk: without wrappers.
        table: of the model's parameters.
        groups: the run's process groups.
    """
    return (shard for shard in shards(chunk, table, groups) if shard.parameter.dim() > 1)


def shards(chunk: GPTModel, table: ParameterTable, groups: ProcessGroupCollection) -> Iterator[Shard]:
    """The same with vectors: norms and biases."""
    model = table.model
    for name, parameter in chunk.named_parameters():
        if parameter.is_meta:
            continue
        row = table.find(name)
        found = re.search(r"layers\.(\d+)\.", name)
        layer = chunk.decoder.layers[int(found[1])].layer_number - 1 if found else 0
        # The last pipeline stage's output layer is, where it is tied, a copy of the embedding.
        is_copy = row.name == "output" and row.init == "embedding"
        whole_name = "embedding.word_embeddings.weight" if is_copy else name
        whole_name = _whole_name(whole_name, layer, groups.ep.rank() * _local_experts(model, groups))
        group = groups.expt_tp if row.split == "expert" else groups.tp
        yield Shard(parameter, WholeMatrix(whole_name, row, layer), group)


def _local_experts(model: ModelConfig, groups: ProcessGroupCollection) -> int:
    return (model.num_moe_experts or 0) // groups.ep.size()


def _whole_name(name: str, layer: int, first_expert: int) -> str:
    """The name with layer and expert counted over all ranks, the same for grouped experts (`linear_fc1.weight3`)."""
    name = re.sub(r"layers\.\d+\.", f"layers.{layer}.", name)
    grouped = re.fullmatch(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)", name)
    if grouped:
        return f"{grouped[1]}{first_expert + int(grouped[3])}.{grouped[2]}"
    return re.sub(r"local_experts\.(\d+)", lambda expert: str(first_expert + int(expert[1])), name)
