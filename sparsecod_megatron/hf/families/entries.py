"""Entries of the name tables: embeddings, norms and attention as all families call them, and pieces of MLPs.

Which tensors there are, and their shapes, comes from the table of parameters; here are only names and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import Transform, folded, gate_up, query_key_value, same, scaled

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What most classes call the three matrices of a gated MLP."""

LATENTS = {
    "query": ("linear_q_proj", "q_proj"),
    "query_down": ("linear_q_down_proj", "q_a_proj"),
    "query_latent_norm": ("q_layernorm", "q_a_layernorm"),
    "query_up": ("linear_q_up_proj", "q_b_proj"),
    "key_value_down": ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    "key_value_latent_norm": ("kv_layernorm", "kv_a_layernorm"),
    "key_value_up": ("linear_kv_up_proj", "kv_b_proj"),
}
"""Row of the table of parameters → the module in Megatron-Core's latent attention, and in classes that have one."""


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer.

    Attributes:
        model: ours.
        layer: from 0.
        rows: of the table of parameters, by name.
        ours: prefix of their names in Megatron, without the last dot.
        theirs: the same in HuggingFace files.
    """

    model: ModelConfig
    layer: int
    rows: dict[str, ParameterKind]
    ours: str
    theirs: str

    @classmethod
    def of(cls, model: ModelConfig, layer: int) -> LayerTensors:
        """Those of layer `layer`."""
        rows = {row.name: row for row in ParameterTable(model).layer(layer)}
        return cls(model, layer, rows, f"decoder.layers.{layer}", f"model.layers.{layer}")

    def query_key_value(self, kind: str = "qkv") -> Transform:
        """How the fused projection is stored, or its bias (`qkv_bias`)."""
        model, gated = self.model, self.model.attention_output_gate == "elementwise"
        shape = self.rows["qkv"].shape if kind == "qkv" else self.rows["qkv"].shape[:1]
        return query_key_value(shape, model.num_attention_heads, model.query_groups, gated=gated)


def outer_entries(model: ModelConfig) -> tuple[list[Entry], list[Entry]]:
    """What comes before the layers, and what comes after them, of a model whose vocabulary is known."""
    table = ParameterTable(model)
    modules = {
        "embedding": ("embedding.word_embeddings", "model.embed_tokens"),
        "embedding_norm": ("embedding_norm", "model.embedding_norm"),
        "final_norm": ("decoder.final_layernorm", "model.norm"),
        "output": ("output_layer", "lm_head"),
    }

    def entry(row: ParameterKind) -> Entry:
        module = row.name.removesuffix("_bias")
        ours, theirs = (f"{name}.{'weight' if row.name == module else 'bias'}" for name in modules[module])
        return _plain(row, ours, theirs)

    return [entry(row) for row in table.first()], [entry(row) for row in table.last(shares_embedding=True)]


def layer_entries(tensors: LayerTensors, *, norm_factor: float) -> Iterator[Entry]:
    """Norms and attention of a layer.

    Args:
        tensors: of the layer.
        norm_factor: on the weights of the norms before the branches.
    """
    rows, ours, theirs = tensors.rows, tensors.ours, tensors.theirs
    names = (f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
    yield from _norm_entries(rows, "attention_norm", *names, norm_factor)
    yield from _attention_entries(tensors)
    for branch, place in (("attention", "self_attn"), ("mlp", "mlp")):
        names = (f"{ours}.{place}_bda.norm", f"{theirs}.{branch}_join_norm")
        yield from _norm_entries(rows, f"{branch}_post_norm", *names)
    names = (f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
    yield from _norm_entries(rows, "mlp_norm", *names, norm_factor)


def _norm_entries(
    rows: Mapping[str, ParameterKind], name: str, ours: str, theirs: str, factor: float = 1.0
) -> Iterator[Entry]:
    """Weight and bias of a norm, as far as the layer has them."""
    for row, part in ((rows.get(name), "weight"), (rows.get(f"{name}_bias"), "bias")):
        if row is not None:
            yield Entry((f"{ours}.{part}",), (f"{theirs}.{part}",), folded(row.shape, factor))


def _attention_entries(tensors: LayerTensors) -> Iterator[Entry]:
    rows, ours, theirs = tensors.rows, f"{tensors.ours}.self_attention", f"{tensors.theirs}.self_attn"
    for kind, end in (("qkv", "weight"), ("qkv_bias", "bias")):
        if kind in rows:
            fused = tensors.query_key_value(kind)
            parts = "qkvg"[: len(fused.hf_shapes)]
            yield Entry((f"{ours}.linear_qkv.{end}",), tuple(f"{theirs}.{part}_proj.{end}" for part in parts), fused)
    for part, name in (("q", "query_norm"), ("k", "key_norm")):
        if (row := rows.get(name)) is not None:
            yield _plain(row, f"{ours}.{part}_layernorm.weight", f"{theirs}.{part}_norm.weight")
    for name, (module, hf) in LATENTS.items():
        if (row := rows.get(name)) is not None:
            yield _plain(row, f"{ours}.{module}.weight", f"{theirs}.{hf}.weight")
    yield _plain(rows["attention_output"], f"{ours}.linear_proj.weight", f"{theirs}.o_proj.weight")
    if (row := rows.get("attention_output_bias")) is not None:
        yield _plain(row, f"{ours}.linear_proj.bias", f"{theirs}.o_proj.bias")
    if (row := rows.get("attention_sinks")) is not None:
        yield _plain(row, f"{ours}.core_attention.softmax_offset", f"{theirs}.sinks")


def mlp_entries(
    tensors: LayerTensors,
    kind: str,
    megatron: str,
    hf: str,
    *,
    hf_names: tuple[str, str, str] = PROJECTIONS,
    down_factor: float = 1.0,
) -> Iterator[Entry]:
    """The matrices of one MLP, and their biases.

    Args:
        tensors: of the layer.
        kind: `mlp`, `expert` or `shared_expert`, as the table of parameters calls it.
        megatron: module that holds `linear_fc1` and `linear_fc2`.
        hf: module that holds the projections.
        hf_names: names of the gate, up and down projections.
        down_factor: power of two folded into the down projection.
    """
    inward, outward = tensors.rows[f"{kind}_input"], tensors.rows[f"{kind}_output"]
    yield _inward(inward, f"{megatron}.linear_fc1.weight", [f"{hf}.{name}.weight" for name in hf_names[:2]])
    down = f"{hf}.{hf_names[2]}"
    yield Entry((f"{megatron}.linear_fc2.weight",), (f"{down}.weight",), scaled(outward.shape, down_factor))
    if (bias := tensors.rows.get(f"{kind}_input_bias")) is not None:
        yield _inward(bias, f"{megatron}.linear_fc1.bias", [f"{hf}.{name}.bias" for name in hf_names[:2]])
        yield _plain(tensors.rows[f"{kind}_output_bias"], f"{megatron}.linear_fc2.bias", f"{down}.bias")


def _inward(row: ParameterKind, ours: str, gate_and_up: list[str]) -> Entry:
    """Weight or bias of an input projection; without a gate there is the second alone."""
    if row.stacked == 1:
        return Entry((ours,), (gate_and_up[1],), same(row.shape))
    return Entry((ours,), tuple(gate_and_up), gate_up(row.shape))


def dense_entries(tensors: LayerTensors) -> Iterator[Entry]:
    """The MLP of a layer without experts."""
    return mlp_entries(tensors, "mlp", f"{tensors.ours}.mlp", f"{tensors.theirs}.mlp")


def routed_entries(
    tensors: LayerTensors, *, place: str = "mlp", hf_names: tuple[str, str, str] = PROJECTIONS
) -> Iterator[Entry]:
    """The router's weight and all routed experts.

    Args:
        tensors: of the layer.
        place: what the class calls the layer's MLP.
        hf_names: names of an expert's projections.
    """
    ours, theirs = f"{tensors.ours}.mlp", f"{tensors.theirs}.{place}"
    yield _plain(tensors.rows["router"], f"{ours}.router.weight", f"{theirs}.gate.weight")
    if (row := tensors.rows.get("router_bias")) is not None:
        yield _plain(row, f"{ours}.router.bias", f"{theirs}.gate.bias")
    for expert in range(tensors.rows["expert_input"].copies):
        names = f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}"
        yield from mlp_entries(tensors, "expert", *names, hf_names=hf_names)


def shared_entries(tensors: LayerTensors, *, name: str = "shared_expert", down_factor: float = 1.0) -> Iterator[Entry]:
    """The shared expert and its gate, as far as the layer has them, under most classes' names."""
    ours, theirs = f"{tensors.ours}.mlp.shared_experts", f"{tensors.theirs}.mlp.{name}"
    if (row := tensors.rows.get("shared_expert_gate")) is not None:
        yield _plain(row, f"{ours}.gate_weight", f"{theirs}_gate.weight")
    if "shared_expert_input" in tensors.rows:
        yield from mlp_entries(tensors, "shared_expert", ours, theirs, down_factor=down_factor)


def renamed(entry: Entry, names: Mapping[str, str], change: Callable[[Transform], Transform] | None = None) -> Entry:
    """The entry as a class has it whose name differs from Llama's; others as they are.

    Args:
        entry: under Llama's names.
        names: last part of the first tensor's name there → the class's one tensor.
        change: what the class does to the layout besides.
    """
    *module, last, part = entry.hf[0].split(".")
    if last not in names:
        return entry
    transform = entry.transform if change is None else change(entry.transform)
    return Entry(entry.megatron, (".".join((*module, names[last], part)),), transform)


def _plain(row: ParameterKind, ours: str, theirs: str) -> Entry:
    """A tensor that is the same on both sides."""
    return Entry((ours,), (theirs,), same(row.shape))
