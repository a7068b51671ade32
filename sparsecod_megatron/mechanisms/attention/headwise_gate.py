"""One output gate per head: output = projection(concat_h(sigmoid(w_h · x) · attention_h(x))), x the normalised input.

Megatron-Core has a gate of every channel (`model.attention_output_gate: elementwise`); its forward pass takes a gate
with queries, keys and values, and applies it before the output projection. This supplies both steps.

Source: Qiu et al., Gated Attention for Large Language Models (arXiv 2505.06708).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.seams.mechanism import (
    ExportedTensor,
    LayerSite,
    Mechanism,
    Module,
    RankShape,
    latent_conflict,
    mixed,
)

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class HeadwiseGate(Mechanism):
    """The gate; it has no settings."""

    name: ClassVar[str] = "headwise_gate"
    shapes_weights: ClassVar[bool] = True
    unfused: ClassVar[tuple[str, ...]] = ("attention",)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """The other gate, which cannot be combined with this one."""
        yield from latent_conflict(self, config.model, "gates ordinary attention; remove one of them")
        if (other := config.model.attention_output_gate) != "none":
            yield f"mechanisms.{self.name}: beside model.attention_output_gate={other}; keep one of them"

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """The gates' projection, one row per head."""
        yield ParameterKind(
            "attention_gate",
            (model.num_attention_heads, model.hidden_size),
            r"self_attention\.linear_gate\.weight",
            init="qkv",
            split="tensor",
            dimension=0,
            fp8=True,
            channels="model.num_attention_heads, each with a gate",
        )

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Self-attention with the projection in it."""
        attention = spec.submodules.self_attention
        attention.module = mixed(HeadwiseGated, attention.module)
        attention.params = {**attention.params, "linear_gate": site.provider.column_parallel_linear()}
        return spec

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """The ungated output, and the gates in fp32."""
        heads = rank.tokens * model.num_attention_heads // rank.tensor
        return {"attention_gate": heads * (model.head_dim * rank.value_bytes + 4)}

    def export(self, model: ModelConfig) -> Module:
        """A projection of its own, as the element-wise gate has in files."""
        shape = (model.num_attention_heads, model.hidden_size)
        return Module(
            code=Path(__file__).with_name("headwise_gate_sparsecod.py"),
            tensors=tuple(
                ExportedTensor(
                    f"decoder.layers.{layer}.self_attention.linear_gate.weight",
                    f"model.layers.{layer}.self_attn.g_proj.weight",
                    shape,
                )
                for layer in range(model.num_layers)
            ),
        )


class HeadwiseGated:
    """What a self-attention becomes: Megatron's forward pass with this gate.

    Args:
        config: the model's.
        submodules: of the self-attention.
        layer_number: 1-based.
        linear_gate: column-parallel linear layer.
        **arguments: SelfAttention's others.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int, *, linear_gate: type, **arguments: Any
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        super().__init__(config, submodules, layer_number, **arguments)  # type: ignore[call-arg]
        self.linear_gate = build_module(
            linear_gate,
            config.hidden_size,
            config.num_attention_heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="gate",
            tp_group=self.pg_collection.tp,  # type: ignore[attr-defined]
        )
        # Only now: it would widen the query projection for Megatron's own gate, and makes `forward` apply this one.
        self.config = copy.copy(config)
        self.config.attention_output_gate = True

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Query, key, value as in the parent, and the gate's logits [S, B, heads/TP]."""
        parent: Any = super()
        projected = parent.get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=split_qkv)
        logits, _ = self.linear_gate(hidden_states)
        return (*projected, logits)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """[S, B, heads/TP · D] and [S, B, heads/TP] → [S, B, heads/TP · D]."""
        heads = x.unflatten(-1, (gate.shape[-1], -1))
        return (heads * torch.sigmoid(gate.float()).unsqueeze(-1)).to(x.dtype).flatten(start_dim=-2)
