"""Every parameter of a model, kind by kind, from its keys alone: its size, what multiplies, what is split over ranks.

Arithmetic only, so that planning a run needs neither torch nor Megatron-Core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparsecod_megatron.config.model_schema import ModelConfig


@dataclass(frozen=True)
class ParameterKind:
    """One parameter of a layer (or of the ends of the model), with its equals in other experts.

    Attributes:
        name: `qkv`, `mlp_input`, `expert_output`, …
        shape: [out, in] of a matrix, [channels] of a norm; of one copy.
        split: over the ranks of tensor parallelism, of `expert` parallelism (and the experts' tensor parallelism), or
            `none`.
        copies: experts.
        used: copies that one token meets.
        fp8: whether Transformer Engine multiplies it in FP8 under an FP8 recipe.
    """

    name: str
    shape: tuple[int, ...]
    split: str = "none"
    copies: int = 1
    used: int = 1
    fp8: bool = False

    @property
    def total(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape) * self.copies

    @property
    def active(self) -> int:
        """Number of them that one token uses."""
        return math.prod(self.shape) * self.used

    @property
    def multiplied(self) -> int:
        """Number of those in a matrix that a token's vector is multiplied by: no norms, no look-up."""
        return self.active if len(self.shape) == 2 and self.name != "embedding" else 0

    def on_rank(self, *, tensor: int, expert: int) -> int:
        """Number of parameters that one rank holds.

        Args:
            tensor: tensor parallel size.
            expert: expert parallel × expert tensor parallel size.
        """
        return self.total // {"none": 1, "tensor": tensor, "expert": expert}[self.split]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        total: all of them, shared ones once.
        active: without the experts that a token does not use.
        embedding: number in the embedding and the output layer, shared ones once.
        by_kind: total by kind.
        by_layer: total by layer.
    """

    total: int
    active: int
    embedding: int
    by_kind: dict[str, int]
    by_layer: list[int]


def count_parameters(model: ModelConfig, *, qkv_bias: bool = False) -> ParameterCount:
    """Count a model whose vocabulary is known; buffers, such as the selection bias of experts, are not parameters.

    Args:
        model: its shape.
        qkv_bias: as for `layer_parameters`.
    """
    layers = [list(layer_parameters(model, layer, qkv_bias=qkv_bias)) for layer in range(model.num_layers)]
    ends = [*first_parameters(model), *last_parameters(model, shares_embedding=True)]
    everything = [*ends, *(kind for layer in layers for kind in layer)]
    by_kind: dict[str, int] = {}
    for kind in everything:
        by_kind[kind.name] = by_kind.get(kind.name, 0) + kind.total
    return ParameterCount(
        total=sum(by_kind.values()),
        active=sum(kind.active for kind in everything),
        embedding=by_kind["embedding"] + by_kind.get("output", 0),
        by_kind=by_kind,
        by_layer=[_total(layer) for layer in layers],
    )


def first_parameters(model: ModelConfig) -> Iterator[ParameterKind]:
    """What stands before the layers."""
    assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
    yield ParameterKind("embedding", (model.vocab_size, model.hidden_size), "tensor")
    if model.has_embedding_norm:
        yield ParameterKind("embedding_norm", (model.hidden_size,))


def last_parameters(model: ModelConfig, *, shares_embedding: bool) -> Iterator[ParameterKind]:
    """What stands behind the layers.

    Args:
        model: its shape.
        shares_embedding: whether the embedding is at hand, so that a tied output layer adds nothing.
    """
    assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
    if model.final_norm:
        yield ParameterKind("final_norm", (model.hidden_size,))
    if model.untie_embeddings_and_output_weights or not shares_embedding:
        yield ParameterKind("output", (model.vocab_size, model.hidden_size), "tensor")


def layer_parameters(model: ModelConfig, layer: int, *, qkv_bias: bool = False) -> Iterator[ParameterKind]:
    """Parameters of layer `layer` (from 0).

    Args:
        model: its shape.
        layer: which.
        qkv_bias: whether `megatron.add_qkv_bias` gives queries, keys and values a bias.
    """
    yield from _norms(model, layer)
    yield from _attention(model, qkv_bias=qkv_bias)
    if model.is_moe_layer(layer):
        yield from _experts(model, layer)
    else:
        yield from _mlp(model, "mlp", model.ffn_hidden_size)


def _norms(model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
    before = not model.is_post_norm(layer)
    for branch in ("attention", "mlp"):
        if before:
            yield ParameterKind(f"{branch}_norm", (model.hidden_size,))
        if not before or model.norm_placement in ("peri", "sandwich"):
            yield ParameterKind(f"{branch}_post_norm", (model.hidden_size,))


def _attention(model: ModelConfig, *, qkv_bias: bool) -> Iterator[ParameterKind]:
    hidden, heads, width = model.hidden_size, model.num_attention_heads, model.head_dim
    queries = 2 * heads if model.attention_output_gate == "elementwise" else heads
    channels = (queries + 2 * model.query_groups) * width
    yield ParameterKind("qkv", (channels, hidden), "tensor", fp8=True)
    if qkv_bias:
        yield ParameterKind("qkv_bias", (channels,), "tensor")
    yield ParameterKind("attention_output", (hidden, heads * width), "tensor", fp8=True)
    if model.attention_output_gate == "headwise":
        yield ParameterKind("attention_gate", (heads, hidden), "tensor", fp8=True)
    if model.qk_norm:
        yield ParameterKind("query_norm", (width,))
        yield ParameterKind("key_norm", (width,))


def _mlp(
    model: ModelConfig, prefix: str, width: int, *, split: str = "tensor", copies: int = 1, used: int = 1
) -> Iterator[ParameterKind]:
    inputs = 2 * width if model.is_gated else width
    yield ParameterKind(f"{prefix}_input", (inputs, model.hidden_size), split, copies, used, fp8=True)
    yield ParameterKind(f"{prefix}_output", (model.hidden_size, width), split, copies, used, fp8=True)


def _experts(model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
    experts = model.num_moe_experts
    assert experts is not None
    yield ParameterKind("router", (experts, model.hidden_size))
    yield from _mlp(
        model, "expert", model.expert_ffn_hidden_size, split="expert", copies=experts, used=model.topk(layer)
    )
    if model.moe_shared_expert_intermediate_size is not None:
        yield from _mlp(model, "shared_expert", model.moe_shared_expert_intermediate_size)
        if model.moe_shared_expert_gate:
            yield ParameterKind("shared_expert_gate", (1, model.hidden_size))


def _total(kinds: Iterable[ParameterKind]) -> int:
    return sum(kind.total for kind in kinds)
