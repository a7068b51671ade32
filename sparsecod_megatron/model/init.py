"""Fresh weights: each matrix drawn by its kind and depth, the same numbers under every parallel layout.

Megatron-Core draws from one generator per rank, so its initial weights depend on the layout. Here every matrix has a
generator of its own, seeded by the run's seed and the matrix's name in the whole model; a rank draws the whole matrix
and keeps its shard. Megatron's own initialisation does nothing (`leave_as_is`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sparsecod_megatron.config import ModelConfig

_KINDS = (
    (r"embedding\.word_embeddings\.weight", "embedding"),
    (r"output_layer\.weight", "output"),
    (r".*\.self_attention\.linear_(qkv|gate)\.weight", "qkv"),
    (r".*\.self_attention\.linear_proj\.weight", "attention_output"),
    (r".*\.linear_fc1\.weight\d*", "mlp_input"),
    (r".*\.linear_fc2\.weight\d*", "mlp_output"),
    (r".*\.mlp\.(router\.weight|shared_experts\.gate_weight)", "router"),
)
"""Names of matrices in a GPTModel, and the kind (a field of InitStdConfig)."""
SHARDED_DIMENSION = {"embedding": 0, "output": 0, "qkv": 0, "mlp_input": 0, "attention_output": 1, "mlp_output": 1}
"""Dimension that tensor parallelism splits; routers are whole on every rank."""
_OUTPUTS = ("attention_output", "mlp_output")
"""Kinds whose product is added to the residual stream."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of the whole model.

    Attributes:
        name: unique in the model, whatever the layout.
        kind: a field of InitStdConfig.
        layer: from 0; 0 outside of layers.
        fan_in: its input size in the whole model.
    """

    name: str
    kind: str
    layer: int
    fan_in: int


def matrix_kind(name: str) -> str | None:
    """The kind (a field of InitStdConfig) of a parameter by its name in a GPTModel; None for vectors."""
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name)), None)


def leave_as_is(tensor: Tensor) -> Tensor:
    """The initialisation that Megatron-Core applies to every matrix when it builds it."""
    return tensor


def initialize(chunk: GPTModel, model: ModelConfig, groups: ProcessGroupCollection, *, seed: int) -> None:
    """Draw every matrix of one model chunk in place; norms stay at 1. Local.

    Args:
        chunk: as built, without wrappers.
        model: its configuration.
        groups: the run's process groups.
        seed: seed of the run.
    """
    for parameter, matrix, tp_group in _matrices(chunk, model, groups):
        sharded = SHARDED_DIMENSION.get(matrix.kind)
        parts = 1 if sharded is None else tp_group.size()
        shape = list(parameter.shape)
        if sharded is not None:
            shape[sharded] *= parts
        whole = draw(model, matrix, shape, seed=seed, device=parameter.device)
        if sharded is not None:
            # A gated MLP's first matrix is gate over up, and a rank holds its part of either.
            stride = 2 if matrix.kind == "mlp_input" and model.is_gated else 1
            whole = torch.cat(whole.chunk(parts * stride, dim=sharded)[tp_group.rank() :: parts], dim=sharded)
        with torch.no_grad():
            parameter.copy_(whole)
            if hasattr(parameter, "get_high_precision_init_val"):
                # Weights kept in FP8: Transformer Engine holds what the optimizer's master weights start from.
                parameter.get_high_precision_init_val().copy_(whole)


def draw(model: ModelConfig, matrix: Matrix, shape: list[int], *, seed: int, device: torch.device) -> Tensor:
    """The whole matrix, fp32. The numbers depend on the seed, the name and the kind of device only."""
    digest = hashlib.sha256(f"{seed} {matrix.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    std = standard_deviation(model, matrix)
    tensor = torch.empty(shape, device=device)
    if model.init == "mitchell":
        return torch.nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)
    return tensor.normal_(std=std, generator=generator)


def standard_deviation(model: ModelConfig, matrix: Matrix) -> float:
    """`init_std` of the kind if set, else that of the scheme, scaled with the width under muP."""
    override: float | None = getattr(model.init_std, matrix.kind)
    return override if override is not None else _SCHEMES[model.init](model, matrix) / _width_factor(model, matrix)


def _normal(model: ModelConfig, matrix: Matrix) -> float:
    return model.init_method_std


def _scaled(model: ModelConfig, matrix: Matrix) -> float:
    """Outputs over sqrt(2 L). Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019)."""
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if matrix.kind in _OUTPUTS else 1.0)


def _mitchell(model: ModelConfig, matrix: Matrix) -> float:
    """1 / sqrt(fan_in), outputs over sqrt(2 (l + 1)) too, cut at 3 std. Source: the `mitchell` scheme of OLMo."""
    if matrix.kind in ("embedding", "output"):
        return model.hidden_size**-0.5
    depth = 2 * (matrix.layer + 1) if matrix.kind in _OUTPUTS else 1
    fan_in = model.hidden_size if matrix.kind == "attention_output" else matrix.fan_in
    return 1 / math.sqrt(fan_in * depth)


def _small_init(model: ModelConfig, matrix: Matrix) -> float:
    """sqrt(2 / 5d), outputs 2 / (L sqrt(d)).

    Source: Nguyen and Salazar, Transformers without Tears (arXiv 1910.05895); Wang and Komatsuzaki, GPT-J-6B (2021).
    """
    if matrix.kind in _OUTPUTS:
        return 2 / (model.num_layers * math.sqrt(model.hidden_size))
    return math.sqrt(2 / (5 * model.hidden_size))


_SCHEMES: dict[str, Callable[[ModelConfig, Matrix], float]] = {
    "normal": _normal,
    "scaled": _scaled,
    "mitchell": _mitchell,
    "small_init": _small_init,
}


def _width_factor(model: ModelConfig, matrix: Matrix) -> float:
    """muP for Adam: hidden matrices' variance ∝ 1/width, the output layer's ∝ 1/width², the embedding's constant.

    Heads keep their size as the model widens, so that attention needs no other scale.
    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 3.
    """
    if matrix.kind == "embedding":
        return 1.0
    return model.width_ratio if matrix.kind in ("output", "router") else math.sqrt(model.width_ratio)


def _matrices(
    chunk: GPTModel, model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[Tensor, Matrix, torch.distributed.ProcessGroup]]:
    """Every parameter that is drawn, its place in the whole model, and the group that shards it."""
    for name, parameter in chunk.named_parameters():
        if parameter.dim() < 2 or parameter.is_meta:
            continue
        kind = matrix_kind(name)
        assert kind is not None, f"no initialisation for {name}"
        is_expert = ".experts." in name
        tp_group = groups.expt_tp if is_expert else groups.tp
        if kind == "output" and not model.untie_embeddings_and_output_weights:
            # The last pipeline stage's copy of the embedding.
            name, kind = "embedding.word_embeddings.weight", "embedding"
        found = re.search(r"layers\.(\d+)\.", name)
        layer = chunk.decoder.layers[int(found[1])].layer_number - 1 if found else 0
        whole_name = _whole_name(name, layer, groups.ep.rank() * _local_experts(model, groups))
        fan_in = parameter.shape[1] * (tp_group.size() if SHARDED_DIMENSION.get(kind) == 1 else 1)
        yield parameter, Matrix(whole_name, kind, layer, fan_in), tp_group


def _local_experts(model: ModelConfig, groups: ProcessGroupCollection) -> int:
    return (model.num_moe_experts or 0) // groups.ep.size()


def _whole_name(name: str, layer: int, first_expert: int) -> str:
    """The name with layer and expert counted over all ranks, the same for grouped experts (`linear_fc1.weight3`)."""
    name = re.sub(r"layers\.\d+\.", f"layers.{layer}.", name)
    grouped = re.fullmatch(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)", name)
    if grouped:
        return f"{grouped[1]}{first_expert + int(grouped[3])}.{grouped[2]}"
    return re.sub(r"local_experts\.(\d+)", lambda expert: str(first_expert + int(expert[1])), name)
