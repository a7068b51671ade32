"""Fresh weights: each matrix drawn by its kind and depth, the same numbers under every parallel layout.

Megatron-Core draws from one generator per rank, so its initial weights depend on the layout. Here every matrix has a
generator of its own, seeded by the run's seed and the matrix's name in the whole model; a rank draws the whole matrix
and keeps its shard. Megatron's own initialisation does nothing (`leave_as_is`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.model.matrices import WholeMatrix, matrices, named_generator

_OUTPUTS = ("attention_output", "mlp_output")
"""Kinds whose product is added to the residual stream."""
_EMPTY = ("attention_sinks", "router_bias")
"""Kinds that upstream's modules leave as the memory was."""


def leave_as_is(tensor: Tensor) -> Tensor:
    """The initialisation that Megatron-Core applies to every matrix when it builds it."""
    return tensor


def initialize(chunk: GPTModel, table: ParameterTable, groups: ProcessGroupCollection, *, seed: int) -> None:
    """Draw every matrix of one model chunk in place; norms stay at 1. Local.

    Args:
        chunk: as built, without wrappers.
        table: of the model's parameters.
        groups: the run's process groups.
        seed: seed of the run.
    """
    shards = list(matrices(chunk, table, groups))
    # What reads and joins a residual path has been made with the values that it begins at.
    for shard in (shard for shard in shards if shard.row.group != NEVER_DECAYS):
        parameter = shard.parameter
        whole = draw(table.model, shard.matrix, shard.whole_shape, seed=seed, device=parameter.device)
        mine = shard.cut(whole)
        with torch.no_grad():
            parameter.copy_(mine)
            if hasattr(parameter, "get_high_precision_init_val"):
                # Weights kept in FP8: Transformer Engine holds what the optimizer's master weights start from.
                parameter.get_high_precision_init_val().copy_(mine)
    for name, parameter in chunk.named_parameters():
        if table.find(name).name in _EMPTY:
            parameter.data.zero_()
    for mechanism in table.mechanisms:
        mechanism.initialize(chunk, {shard.parameter: shard for shard in shards}, seed)


def draw(model: ModelConfig, matrix: WholeMatrix, shape: list[int], *, seed: int, device: torch.device) -> Tensor:
    """The whole matrix, fp32. The numbers depend on the seed, the name and the kind of device only."""
    generator = named_generator(f"{seed} {matrix.name}", device)
    std = standard_deviation(model, matrix)
    tensor = torch.empty(shape, device=device)
    if model.init == "mitchell":
        return torch.nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)
    return tensor.normal_(std=std, generator=generator)


def standard_deviation(model: ModelConfig, matrix: WholeMatrix) -> float:
    """`init_std` of the kind if set, else that of the scheme, scaled with the width under muP."""
    override: float | None = getattr(model.init_std, matrix.init)
    return override if override is not None else _SCHEMES[model.init](model, matrix) / _width_factor(model, matrix)


def _normal(model: ModelConfig, matrix: WholeMatrix) -> float:
    return model.init_method_std


def _scaled(model: ModelConfig, matrix: WholeMatrix) -> float:
    """Outputs over sqrt(2 L). Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019)."""
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if matrix.init in _OUTPUTS else 1.0)


def _mitchell(model: ModelConfig, matrix: WholeMatrix) -> float:
    """1 / sqrt(fan_in), outputs over sqrt(2 (l + 1)) too, cut at 3 std. Source: the `mitchell` scheme of OLMo."""
    if matrix.init in ("embedding", "output"):
        return model.hidden_size**-0.5
    depth = 2 * (matrix.layer + 1) if matrix.init in _OUTPUTS else 1
    fan_in = model.hidden_size if matrix.init == "attention_output" else matrix.fan_in
    return 1 / math.sqrt(fan_in * depth)


def _small_init(model: ModelConfig, matrix: WholeMatrix) -> float:
    """sqrt(2 / 5d), outputs 2 / (L sqrt(d)).

    Source: Nguyen and Salazar, Transformers without Tears (arXiv 1910.05895); Wang and Komatsuzaki, GPT-J-6B (2021).
    """
    if matrix.init in _OUTPUTS:
        return 2 / (model.num_layers * math.sqrt(model.hidden_size))
    return math.sqrt(2 / (5 * model.hidden_size))


_SCHEMES: dict[str, Callable[[ModelConfig, WholeMatrix], float]] = {
    "normal": _normal,
    "scaled": _scaled,
    "mitchell": _mitchell,
    "small_init": _small_init,
}


def _width_factor(model: ModelConfig, matrix: WholeMatrix) -> float:
    """muP for Adam: hidden matrices' variance ∝ 1/width, the output layer's ∝ 1/width², the embedding's constant.

    Heads keep their size as the model widens, so that attention needs no other scale.
    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 3.
    """
    if matrix.init == "embedding":
        return 1.0
    return model.width_ratio if matrix.init in ("output", "router") else math.sqrt(model.width_ratio)
