"""What each module of a model gives, ours and transformers' under the same names, to say which tensor is wrong.

The pairs are found through the modules' meaning in Megatron-Core, not through the name tables: they are what the tables
are checked by. Names are transformers': `layers.3.self_attn.q_proj`. Tensors are `[batch, tokens, channels]`, of the
first tokens: the outputs of all modules are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families import names_in
from sparsecod_megatron.hf.families.common import SANDWICH_NORMS
from sparsecod_megatron.hf.rounding import channel_limits
from sparsecod_megatron.seams.mechanism import ExportedTensor

Outputs = dict[str, Tensor]
Record = Callable[[str, Tensor], None]

TOKENS = 32
"""Tokens of each sequence whose outputs are kept."""
NORMS = {"input_layernorm": "input_layernorm", **{theirs: ours for ours, theirs in SANDWICH_NORMS.items()}}
"""Norms of layers with some behind branches, in classes of transformers → in ours."""
_OF_LATENTS = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
}
"""Modules of latent attention in Megatron-Core → in transformers, in order."""
CAUSES_WITHOUT_TENSOR = {
    "self_attn": "attention between its projections: rotary embedding, window, number of heads or gate",
    "mlp.act": "the activation",
    "memory": "what is added to its input: hash, gate or convolution",
    "expansion": "the first residual state: a tensor of expansion",
    "contraction": "what the final norm reads of the residual state: a tensor of contraction",
}
CAUSES_WITHOUT_TENSOR |= {
    f"{branch}_residual.{part}": f"how {branch} {verb} the residual state: a tensor of {branch}_residual.{part}"
    for branch in ("attention", "mlp")
    for part, verb in (("read", "reads"), ("write", "joins"))
}
"""Modules whose output no single tensor decides, and what does."""


@contextmanager
def megatron_outputs(model: Any, config: ModelConfig, own: Sequence[ExportedTensor] = ()) -> Iterator[Outputs]:
    """Filled by a forward pass of a single-process GPTModel while the block runs; a second pass replaces the first.

    Args:
        model: the GPTModel.
        config: ours.
        own: tensors of mechanisms, whose modules are watched too.
    """
    outputs: Outputs = {}

    def record(name: str, value: Tensor) -> None:
        # Megatron holds the sequence first, and adds the residual stream to some outputs in place.
        outputs[name] = value.detach()[:TOKENS].transpose(0, 1).flatten(start_dim=2).float().clone()

    hooks = Hooks(record)
    embedding = getattr(model, "embedding_norm", model.embedding)
    hooks.after(embedding, "embed_tokens")
    for index, layer in enumerate(model.decoder.layers):
        _watch_megatron_layer(hooks, layer, f"layers.{index}", config)
    for tensor in own:
        hooks.after(model.get_submodule(_module(tensor.megatron)), _module(tensor.hf).removeprefix("model."))
    # Its scale is that of the logits, which transformers' classes divide.
    final = getattr(model.decoder, "final_layernorm", None)
    hooks.with_output(final, lambda output: record("norm", config.logits_scaling * output))
    try:
        yield outputs
    finally:
        hooks.remove()


@contextmanager
def transformers_outputs(model: Any, record: Record, own: Sequence[ExportedTensor] = ()) -> Iterator[None]:
    """Hand the same of a causal language model of transformers to a function, which may not keep it: it is a view."""

    def with_sequences(name: str, value: Tensor) -> None:
        # What belongs to a router sees bare tokens too; it is watched where the router's logits are taken.
        if value.dim() > 2:
            record(name, value.detach()[:, :TOKENS].flatten(start_dim=2))

    hooks = Hooks(with_sequences)
    decoder, named = model.get_decoder(), names_in(model)
    norm = getattr(decoder, "embedding_norm", None)
    # Gemma's module multiplies what it looks up; ours does so behind it.
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0) if norm is None else 1.0
    first = embedding if norm is None else norm
    hooks.with_output(first, lambda output: with_sequences("embed_tokens", output / scale))
    for index, layer in enumerate(decoder.layers):
        _watch_transformers_layer(hooks, layer, f"layers.{index}", named)
    for tensor in own:
        hooks.after(model.get_submodule(_module(tensor.hf)), _module(tensor.hf).removeprefix("model."))
    hooks.after(getattr(decoder, named("norm")), "norm")
    try:
        yield
    finally:
        hooks.remove()


def first_difference(
    expected: Mapping[str, Tensor], exact: Mapping[str, Tensor], noise: Mapping[str, Tensor]
) -> str | None:
    """First name, in the order of computation, whose outputs rounding cannot explain; None if it explains all.

    Args:
        expected: outputs of our model.
        exact: outputs of transformers' model in float64.
        noise: largest differences of transformers' fp32 passes from it, by channel.
    """
    stream = torch.zeros(())
    # As recorded where the order says nothing: a module behind those inside it.
    for name in sorted((name for name in expected if name in exact), key=_order):
        reference = exact[name]
        ours = expected[name].to(reference.device)
        if ours.shape != reference.shape:
            return name
        largest = by_channel(reference)
        if _is_residual_stream(name):
            # What a branch takes away again has left its rounding in the sum.
            largest = stream = torch.maximum(largest, stream.to(largest.device))
        if not bool((by_channel(ours - reference) <= channel_limits(noise[name], largest)).all()):
            return name
    return None


def outside_of_branches(outputs: Mapping[str, Tensor]) -> Outputs:
    """Those whose channels are not neurons or heads: the same in a model with fewer of them."""
    return {name: value for name, value in outputs.items() if ".".join(name.split(".")[2:]) not in _INSIDE}


def by_channel(values: Tensor) -> Tensor:
    """Largest absolute value of each channel, [channels]."""
    return values.abs().amax((0, 1)).double()


def _module(tensor: str) -> str:
    """Name of the module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def _is_residual_stream(name: str) -> bool:
    return name.startswith("layers.") and name.count(".") == 1


def described(name: str, model: Any) -> str:
    """`layer 3: model.layers.3.self_attn.q_proj.weight`, or what it is that no tensor decides.

    Args:
        name: of the module that differs.
        model: transformers' own; the bias of a module that has one may be what is wrong.
    """
    prefix, module = name.split("."), names_in(model)(f"model.{name}")
    has_bias = getattr(dict(model.named_modules()).get(module), "bias", None) is not None
    tensor = f"{module}.weight{' or bias' if has_bias else ''}"
    if name == "embed_tokens":
        return f"the embeddings: {tensor}"
    if name == "norm":
        return f"after the last layer: {tensor}"
    inside = ".".join(prefix[2:])
    what = CAUSES_WITHOUT_TENSOR.get(inside, tensor if inside else "the sum of its branches")
    return f"layer {prefix[1]}: {what}"


class Hooks:
    """Forward hooks that hand outputs to a function by name, until they are removed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._handles: list[Any] = []
        self._names: set[str] = set()

    def after(self, module: nn.Module | None, name: str) -> None:
        """Record a module's output, once by each name, if the model has it and it has a weight to be wrong."""
        if module is not None and name not in self._names:
            self._names.add(name)
            self.with_output(module, lambda output: self.record(name, output))

    def with_output(self, module: nn.Module | None, use: Callable[[Tensor], None]) -> None:
        """Call with a module's output, the first of several, and with the bias that it leaves to what follows."""
        if module is not None and any(True for _ in module.parameters()):

            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                # A mechanism may pass on a bias of another module (Monet's), which the other model adds later too.
                leaves_bias = getattr(module, "skip_bias_add", False) and getattr(module, "bias", None) is not None
                left = output[1] if leaves_bias else None
                use(first if left is None else first + left)

            self._handles.append(module.register_forward_hook(hook))

    def with_input(self, module: nn.Module | None, use: Callable[[Tensor], None]) -> None:
        """Call with a module's first input."""
        if module is not None:

            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                use(inputs[0])

            self._handles.append(module.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()


def _watch_megatron_layer(hooks: Hooks, layer: Any, at: str, config: ModelConfig) -> None:
    attention, record = layer.self_attention, hooks.record
    hooks.after(layer.input_layernorm, f"{at}.input_layernorm")

    def split(output: Tensor) -> None:
        heads, groups = config.num_attention_heads, config.query_groups
        has_gate = config.attention_output_gate == "elementwise"
        per_group = heads // groups
        slots = output.unflatten(-1, (groups, -1, config.head_dim))
        first_key = per_group * (2 if has_gate else 1)
        record(f"{at}.self_attn.q_proj", slots[..., :per_group, :].flatten(start_dim=2))
        record(f"{at}.self_attn.k_proj", slots[..., first_key, :].flatten(start_dim=2))
        record(f"{at}.self_attn.v_proj", slots[..., first_key + 1, :].flatten(start_dim=2))
        if has_gate:
            record(f"{at}.self_attn.g_proj", slots[..., per_group:first_key, :].flatten(start_dim=2))

    if config.multi_latent_attention:
        for ours, theirs in _OF_LATENTS.items():
            hooks.after(getattr(attention, ours, None), f"{at}.self_attn.{theirs}")
    else:
        hooks.with_output(attention.linear_qkv, split)
        hooks.after(attention.q_layernorm, f"{at}.self_attn.q_norm")
        hooks.after(attention.k_layernorm, f"{at}.self_attn.k_norm")
    hooks.with_input(attention.linear_proj, lambda x: record(f"{at}.self_attn", x))
    hooks.after(attention.linear_proj, f"{at}.self_attn.o_proj")
    hooks.after(getattr(layer.self_attn_bda, "norm", None), f"{at}.attention_join_norm")
    hooks.after(layer.pre_mlp_layernorm, f"{at}.post_attention_layernorm")
    if config.is_moe_layer(int(at.split(".")[1])):
        hooks.with_input(layer.mlp, lambda x: _record_megatron_experts(record, layer.mlp, x[:TOKENS], f"{at}.mlp"))
    else:
        _watch_megatron_mlp(hooks, layer.mlp, f"{at}.mlp", config)
    hooks.after(getattr(layer.mlp_bda, "norm", None), f"{at}.mlp_join_norm")
    hooks.after(layer, at)


def _watch_megatron_mlp(hooks: Hooks, mlp: Any, at: str, config: ModelConfig) -> None:
    def split(output: Tensor) -> None:
        gate, up = output.chunk(2, dim=-1) if config.is_gated else (None, output)
        hooks.record(f"{at}.up_proj", up)
        if gate is not None:
            hooks.record(f"{at}.gate_proj", gate)

    hooks.with_output(mlp.linear_fc1, split)
    hooks.with_input(mlp.linear_fc2, lambda x: hooks.record(f"{at}.act", x))
    hooks.after(mlp.linear_fc2, f"{at}.down_proj")


def _record_megatron_experts(record: Record, moe: Any, x: Tensor, at: str) -> None:
    """Router logits, every routed expert on every token, and the shared expert with its gate."""
    record(f"{at}.gate", moe.router.gating(x))
    for index, expert in enumerate(moe.experts.local_experts):
        output, bias = expert(x)
        record(f"{at}.experts.{index}", output if bias is None else output + bias)
    if moe.shared_experts is not None:
        record(f"{at}.shared_expert", moe.shared_experts(x))


def _watch_transformers_layer(hooks: Hooks, layer: Any, at: str, named: Callable[[str], str]) -> None:
    attention, record = getattr(layer, named("self_attn")), hooks.record
    names = NORMS if hasattr(layer, "post_feedforward_layernorm") else {name: name for name in NORMS.values()}
    for theirs, ours in names.items():
        hooks.after(getattr(layer, theirs, None), f"{at}.{ours}")
    heads_first = hasattr(layer, "pre_feedforward_layernorm")  # Gemma normalises queries and keys when they are
    for name in dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", *_OF_LATENTS.values())):
        own = partial(_record_one_head, record, f"{at}.self_attn.{name}")
        hooks.with_output(getattr(attention, named(name), None), own)
    for name in ("q_norm", "k_norm"):
        own = partial(_record_heads, record, f"{at}.self_attn.{name}", heads_first)
        hooks.with_output(getattr(attention, name, None), own)
    hooks.with_input(getattr(attention, named("o_proj")), lambda x: record(f"{at}.self_attn", x))
    if hasattr(layer.mlp, "experts"):
        hooks.with_input(
            layer.mlp, lambda x: _record_transformers_experts(record, layer.mlp, x[:, :TOKENS], f"{at}.mlp")
        )
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            hooks.after(getattr(layer.mlp, named(name), None), f"{at}.mlp.{name}")
        hooks.with_input(getattr(layer.mlp, named("down_proj")), lambda x: record(f"{at}.mlp.act", x))
    hooks.after(layer, at)


def _record_heads(record: Record, name: str, heads_first: bool, output: Tensor) -> None:
    """Normalised queries or keys, of each token together; one norm of all heads has them so already."""
    record(name, output.transpose(1, 2) if heads_first and output.dim() == 4 else output)


def _record_one_head(record: Record, name: str, output: Tensor) -> None:
    """What a projection gives; latents have an axis of one head there."""
    record(name, output.squeeze(1) if output.dim() == 4 else output)


def _record_transformers_experts(record: Record, moe: Any, x: Tensor, at: str) -> None:
    router = moe.gate if hasattr(moe, "gate") else moe.router
    bias = getattr(router, "bias", None)
    record(f"{at}.gate", router.logits(x) if hasattr(router, "logits") else F.linear(x, router.weight, bias))
    if getattr(moe, "shared_expert", None) is not None:
        gate = moe.shared_expert_gate
        record(f"{at}.shared_expert", moe.shared_expert(x) * (1.0 if gate is None else torch.sigmoid(gate(x))))
    experts = moe.experts
    if isinstance(experts, nn.ModuleList):
        for index, expert in enumerate(experts):
            record(f"{at}.experts.{index}", expert(x))
        return
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS
        entered, left = experts.gate_up_proj_bias, experts.down_proj_bias
        for index in range(len(entered)):
            inner = experts._apply_gate(x @ experts.gate_up_proj[index] + entered[index])
            record(f"{at}.experts.{index}", inner @ experts.down_proj[index] + left[index])
        return
    for index in range(len(experts.gate_up_proj)):
        gate, up = F.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
        record(f"{at}.experts.{index}", F.linear(experts.act_fn(gate) * up, experts.down_proj[index]))


_INSIDE = frozenset(f"self_attn.{name}_proj" for name in "qkvg") | {"self_attn"}
_INSIDE |= {"mlp.gate_proj", "mlp.up_proj", "mlp.act"}
"""Stages whose channels are heads' or neurons'."""
_STAGES = (
    "expansion",
    "attention_residual.read",
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.g_proj",
    *(f"self_attn.{name}" for name in _OF_LATENTS.values() if name != "q_proj"),
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn",
    "self_attn.o_proj",
    "attention_join_norm",
    "attention_residual.write",
    "mlp_residual.read",
    "post_attention_layernorm",
    "mlp.gate",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act",
    "mlp.down_proj",
    "mlp.experts",
    "mlp.shared_expert",
    "mlp_join_norm",
    "mlp_residual.write",
    "",
    "contraction",
)


def _order(name: str) -> tuple[int, int, int]:
    """Embedding, layers stage by stage, final norm."""
    if not name.startswith("layers."):
        return (-1 if name == "embed_tokens" else torch.iinfo(torch.int64).max, 0, 0)
    _, layer, *inside = name.split(".")
    if inside[:2] == ["mlp", "experts"]:
        return int(layer), _STAGES.index("mlp.experts"), int(inside[2])
    stage = ".".join(inside)
    if inside[:1] == ["memory"]:  # of a mechanism, before the layer's own
        return int(layer), -1, 0
    if stage not in _STAGES:  # of a mechanism: before what its module or branch makes of it
        module = stage.rpartition(".")[0]
        stage = module if module in _STAGES else "mlp.act"
        return int(layer), _STAGES.index(stage), -1
    return int(layer), _STAGES.index(stage), 0
