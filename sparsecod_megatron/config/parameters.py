"""THE table of a model's tensors: one row for each kind of parameter, with every fact that some part of a run needs.

Initialisation, parameter groups, sharding marks, planning, precision checks, mechanisms, name tables of HuggingFace
classes and the audit read it; none keeps a list of its own. Arithmetic only, so that planning a run needs neither torch
nor Megatron-Core.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparsecod_megatron.config.model_schema import ModelConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind, StepFactors
from sparsecod_megatron.config.schema import RunConfig


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        total: all of them, shared ones once.
        active: without the experts, and the rows of mechanisms' tables, that a token does not use.
        embedding: number in the embedding and the output layer, shared ones once.
        live: without those that a mechanism holds at zero.
        by_kind: total by kind.
        by_layer: total by layer; nothing in one that computes with another's.
    """

    total: int
    active: int
    embedding: int
    live: int
    by_kind: dict[str, int]
    by_layer: list[int]


@dataclass(frozen=True)
class ParameterTable:
    """The kinds of parameters of one model.

    Attributes:
        model: its shape.
        mechanisms: `seams.mechanism.Mechanism`s, which add kinds of their own.
    """

    model: ModelConfig
    mechanisms: tuple[Any, ...] = field(default=())

    @classmethod
    def of(cls, config: RunConfig) -> ParameterTable:
        """The table of a run."""
        return cls(config.model, tuple(config.mechanisms.values()))

    def first(self) -> Iterator[ParameterKind]:
        """What stands before the layers; the vocabulary is known."""
        yield from self._stepped(self._first(), None)

    def _first(self) -> Iterator[ParameterKind]:
        model = self.model
        assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
        shape, name = (model.vocab_size, model.hidden_size), r"embedding\.word_embeddings\.weight"
        yield ParameterKind("embedding", shape, name, "embeddings", "embedding", "tensor", 0, looked_up=True)
        if model.has_embedding_norm:
            yield from _norm(model, "embedding_norm", "embedding_norm.weight")
        for mechanism in self.mechanisms:
            yield from mechanism.end_parameters(model)[0]

    def last(self, *, shares_embedding: bool) -> Iterator[ParameterKind]:
        """What stands behind the layers; the vocabulary is known.

        Args:
            shares_embedding: whether the embedding is at hand, so that a tied output layer adds nothing.
        """
        yield from self._stepped(self._last(shares_embedding=shares_embedding), None)

    def _last(self, *, shares_embedding: bool) -> Iterator[ParameterKind]:
        model = self.model
        assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
        if model.final_norm:
            yield from _norm(model, "final_norm", "decoder.final_layernorm.weight")
        for mechanism in self.mechanisms:
            yield from mechanism.end_parameters(model)[1]
        tied = not model.untie_embeddings_and_output_weights
        if not tied or not shares_embedding:
            # Tied, it is the last pipeline stage's copy of the embedding.
            group, init = ("embeddings", "embedding") if tied else ("output", "output")
            shape = (model.vocab_size, model.hidden_size)
            yield ParameterKind("output", shape, r"output_layer\.weight", group, init, "tensor", 0)

    def owner(self, layer: int) -> int:
        """The layer (from 0) that holds what layer `layer` computes with: itself, unless they share parameters."""
        for mechanism in self.mechanisms:
            layer = mechanism.owner(self.model, layer)
        return layer

    def layer(self, layer: int) -> Iterator[ParameterKind]:
        """Parameters that layer `layer` (from 0) computes with."""
        yield from self._stepped(self._layer(layer), layer)

    def _layer(self, layer: int) -> Iterator[ParameterKind]:
        for kind in self.plain_layer(layer):
            held = (kind,)
            for mechanism in self.mechanisms:
                held = tuple(part for whole in held for part in mechanism.made_of(whole, self.model, layer))
            yield from held
        for mechanism in self.mechanisms:
            yield from mechanism.parameters(self.model, layer)

    def plain_layer(self, layer: int) -> Iterator[ParameterKind]:
        """Those of Megatron-Core's own layer."""
        model = self.model
        yield from _norms(model, layer)
        yield from _attention(model)
        if model.is_moe_layer(layer):
            yield from _experts(model, layer)
        else:
            names = r"mlp\.linear_fc{}\.weight"
            yield from _mlp(model, "mlp", model.ffn_hidden_size, names, channels="model.ffn_hidden_size")
            if model.mlp_bias:
                yield from _mlp_biases(model, "mlp", model.ffn_hidden_size, names)

    def _stepped(self, kinds: Iterable[ParameterKind], layer: int | None) -> Iterator[ParameterKind]:
        """With the factors that mechanisms put on their steps; `layer` is None at the ends of the model."""
        for kind in kinds:
            for mechanism in self.mechanisms:
                kind = mechanism.stepped(kind, self.model, layer)
            yield kind

    def step_factors(self, group: str) -> list[StepFactors]:
        """What the steps of a group's parameters are multiplied by, each once, in ascending order."""
        return sorted({kind.step_factors for kind in self._kinds if kind.group == group})

    def find(self, name: str) -> ParameterKind:
        """The kind of a parameter by its name in a GPTModel, wrapped or not; of one layer, where layers differ.

        Raises:
            LookupError: no row has such a name.
        """
        inside = re.search(r"(?:^|\.)decoder\.layers\.\d+\.(.+)", name)
        own = inside[1] if inside else re.sub(r"^(module\.)+", "", name)
        for kind in self._kinds:
            if re.fullmatch(kind.pattern, own):
                return kind
        raise LookupError(f"the table of parameters has no row for {name}")

    def count(self) -> ParameterCount:
        """Count a model whose vocabulary is known; buffers, such as the selection bias of experts, are none."""
        layers = [[*self.layer(at)] if self.owner(at) == at else [] for at in range(self.model.num_layers)]
        ends = [*self.first(), *self.last(shares_embedding=True)]
        kinds = [*ends, *(kind for layer in layers for kind in layer)]
        by_kind: dict[str, int] = {}
        for kind in kinds:
            by_kind[kind.name] = by_kind.get(kind.name, 0) + kind.total
        total = sum(by_kind.values())
        return ParameterCount(
            total=total,
            active=sum(kind.active for kind in kinds),
            embedding=by_kind["embedding"] + by_kind.get("output", 0),
            live=total - sum(mechanism.dead_parameters(self) for mechanism in self.mechanisms),
            by_kind=by_kind,
            by_layer=[sum(kind.total for kind in layer) for layer in layers],
        )

    @cached_property
    def _kinds(self) -> list[ParameterKind]:
        """One row for each pattern; of a matrix that is computed from others too, after them."""
        layers = range(self.model.num_layers)
        own, plain = ([kind for layer in layers for kind in of(layer)] for of in (self.layer, self.plain_layer))
        rows = {kind.pattern: kind for kind in (*self.first(), *self.last(shares_embedding=False), *own)}
        replaced = {kind.pattern: kind for kind in plain if kind.pattern not in rows}
        return [*rows.values(), *replaced.values()]


def _norm(model: ModelConfig, name: str, *places: str) -> Iterator[ParameterKind]:
    """A norm of the residual stream, and a LayerNorm's bias; `places` are names of the weight."""
    for part, group in (("weight", "norms"), ("bias", "biases"))[: 1 + model.has_norm_biases]:
        pattern = "|".join(re.escape(f"{place.removesuffix('weight')}{part}") for place in places)
        yield ParameterKind(name if part == "weight" else f"{name}_bias", (model.hidden_size,), pattern, group)


def _norms(model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
    """Transformer Engine's fused layers hold the norm before them; checkpoints use their names (`NORM_RENAMES`)."""
    before = model.has_input_norm(layer)
    for branch, linear, join in (("attention", _QKV, "self_attn_bda"), ("mlp", _FC1, "mlp_bda")):
        if before:
            fused = f"{linear}.layer_norm_weight"
            yield from _norm(model, f"{branch}_norm", NORM_RENAMES[fused], fused)
        if not before or model.has_branch_norm:
            yield from _norm(model, f"{branch}_post_norm", f"{join}.norm.weight")


_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
_NORMS = {f"{_QKV}.layer_norm_": "input_layernorm.", f"{_FC1}.layer_norm_": "pre_mlp_layernorm."}
NORM_RENAMES = {fused + part: norm + part for fused, norm in _NORMS.items() for part in ("weight", "bias")}
"""Names of input norms in checkpoints, where they are called as if fused into the next layer, and in the model."""


def _attention(model: ModelConfig) -> Iterator[ParameterKind]:
    hidden, heads, at = model.hidden_size, model.num_attention_heads, r"self_attention\."
    yield from _latents(model) if model.multi_latent_attention else _queries_keys_values(model)
    yield ParameterKind(
        "attention_output",
        (hidden, heads * model.value_channels),
        rf"{at}linear_proj\.weight",
        init="attention_output",
        split="tensor",
        dimension=1,
        fp8=True,
        channels="model.num_attention_heads × head channels",
    )
    if model.attention_output_bias:
        # Added once to the sum over tensor-parallel ranks, so each holds it whole.
        yield ParameterKind("attention_output_bias", (hidden,), rf"{at}linear_proj\.bias", "biases")
    if model.softmax_type == "learnable":
        name = rf"{at}core_attention\.softmax_offset"
        yield ParameterKind("attention_sinks", (heads,), name, "biases", None, "tensor", 0)


def _queries_keys_values(model: ModelConfig) -> Iterator[ParameterKind]:
    heads, width, at = model.num_attention_heads, model.head_dim, r"self_attention\."
    queries = 2 * heads if model.attention_output_gate == "elementwise" else heads
    channels = (queries + 2 * model.query_groups) * width
    yield ParameterKind(
        "qkv",
        (channels, model.hidden_size),
        rf"{at}linear_qkv\.weight",
        init="qkv",
        split="tensor",
        dimension=0,
        fp8=True,
        channels="model.num_query_groups: query, key and value channels",
    )
    if model.qkv_bias:
        yield ParameterKind("qkv_bias", (channels,), rf"{at}linear_qkv\.bias", "biases", None, "tensor", 0)
    if model.qk_norm:
        for name, count in (("query", heads), ("key", model.query_groups)):
            size, split, dimension = (count * width, "tensor", 0) if model.norms_projections else (width, "none", None)
            at_norm = rf"{at}{name[0]}_layernorm\.weight"
            yield ParameterKind(f"{name}_norm", (size,), at_norm, "norms", None, split, dimension)


def _latents(model: ModelConfig) -> Iterator[ParameterKind]:
    """Latents are whole on each rank, as the norms on them are; what makes heads of them is split by heads."""
    hidden, heads, at = model.hidden_size, model.num_attention_heads, r"self_attention\."
    queries, per_head = heads * model.score_channels, model.qk_head_dim + model.v_head_dim
    latents = {"q": ("query", model.q_lora_rank), "kv": ("key_value", model.kv_lora_rank)}
    beside = {"q": 0, "kv": model.qk_pos_emb_head_dim}
    made = {"q": queries, "kv": heads * per_head}
    split: dict[str, Any] = {"split": "tensor", "dimension": 0, "channels": "model.num_attention_heads × head channels"}
    for part, (name, rank) in latents.items():
        if rank is None:
            pattern = rf"{at}linear_{part}_proj\.weight"
            yield ParameterKind(name, (made[part], hidden), pattern, init="qkv", fp8=True, **split)
            continue
        pattern, key = rf"{at}linear_{part}_down_proj\.weight", f"model.{part}_lora_rank and what rotates beside it"
        shape = (rank + beside[part], hidden)
        yield ParameterKind(f"{name}_down", shape, pattern, init="qkv", fp8=True, channels=key)
        yield ParameterKind(f"{name}_latent_norm", (rank,), rf"{at}{part}_layernorm\.weight", "norms")
        pattern = rf"{at}linear_{part}_up_proj\.weight"
        yield ParameterKind(f"{name}_up", (made[part], rank), pattern, init="qkv", fp8=True, **split)


def _mlp(
    model: ModelConfig, prefix: str, width: int, names: str, *, channels: str, **spread: Any
) -> Iterator[ParameterKind]:
    """Both matrices of an MLP; `names` is their pattern, with a place for the number of the layer."""
    stacked = 2 if model.is_gated else 1
    shared: dict[str, Any] = {"split": "tensor", "fp8": True, "channels": channels, **spread}
    shape, name = (stacked * width, model.hidden_size), names.replace("{}", "1")
    yield ParameterKind(f"{prefix}_input", shape, name, init="mlp_input", dimension=0, stacked=stacked, **shared)
    shape, name = (model.hidden_size, width), names.replace("{}", "2")
    yield ParameterKind(f"{prefix}_output", shape, name, init="mlp_output", dimension=1, **shared)


def _mlp_biases(
    model: ModelConfig, prefix: str, width: int, names: str, *, split: str = "tensor", copies: int = 1, used: int = 1
) -> Iterator[ParameterKind]:
    """Biases of both matrices; an expert with some is whole on its rank, others add the second once to a sum."""
    stacked, names = 2 if model.is_gated else 1, names.replace("weight", "bias")
    shared: dict[str, Any] = {"group": "biases", "copies": copies, "used": used}
    dimension, whole = (0, "none") if split == "tensor" else (None, split)
    cut: dict[str, Any] = {"split": split, "dimension": dimension, "stacked": stacked}
    yield ParameterKind(f"{prefix}_input_bias", (stacked * width,), names.replace("{}", "1"), **cut, **shared)
    yield ParameterKind(f"{prefix}_output_bias", (model.hidden_size,), names.replace("{}", "2"), split=whole, **shared)


def _experts(model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
    experts, hidden = model.num_moe_experts, model.hidden_size
    assert experts is not None
    # One by one, counted on the rank or in the whole model; or grouped by Transformer Engine.
    names = r"mlp\.experts\.(?:(?:local_experts\.)?\d+\.linear_fc{}\.weight|linear_fc{}\.weight\d+)"
    spread: dict[str, Any] = {"split": "expert", "copies": experts, "used": model.topk(layer)}
    yield ParameterKind("router", (experts, hidden), r"mlp\.router\.weight", "router", "router")
    width = model.expert_ffn_hidden_size
    yield from _mlp(model, "expert", width, names, channels="model.moe_ffn_hidden_size", **spread)
    if model.mlp_bias:
        yield ParameterKind("router_bias", (experts,), r"mlp\.router\.bias", "biases")
        yield from _mlp_biases(model, "expert", width, names, **spread)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        names = r"mlp\.shared_experts\.linear_fc{}\.weight"
        yield from _mlp(model, "shared_expert", shared, names, channels="model.moe_shared_expert_intermediate_size")
        if model.moe_shared_expert_gate:
            name = r"mlp\.shared_experts\.gate_weight"
            yield ParameterKind("shared_expert_gate", (1, hidden), name, init="router")
