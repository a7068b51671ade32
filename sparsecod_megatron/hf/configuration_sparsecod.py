"""Configuration of the `sparsecod` architecture: every variant of the model family, for plain transformers.

Copied as it is into an export, next to the modeling files, so that `trust_remote_code=True` loads it without this
package. Names are this project's own where transformers has none; defaults are a dense pre-norm model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .extensions_sparsecod import FORMER_FIELDS


class SparsecodConfig(PreTrainedConfig):
    """What `SparsecodForCausalLM` computes; the keys mean what they mean in a run's `model:` section.

    0 is derived: as many key heads as query heads, the width shared by the heads, experts as wide as dense layers.
    `layer_types` follows from `sliding_window` and `window_attn_skip_freq`, and `rope_parameters` holds transformers'
    own rotary keys. `mechanisms` holds, by name, the settings of what `extensions_sparsecod.py` makes of the layers.
    """

    model_type = "sparsecod"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_parameters: Any = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    norm_placement: str = "pre"
    mix_post_fraction: float = 0.25
    layernorm_scaling: bool = False
    layernorm_zero_centered_gamma: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    softmax_type: str = "vanilla"
    activation_func_clamp_value: float = 7.0
    rotary_base_local: int | None = None
    no_rope_freq: list[int] | None = None
    softmax_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_output_gate: str = "none"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    mechanisms: Any = None
    sliding_window: int | None = None
    window_attn_skip_freq: int | None = None
    layer_types: Any = None

    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_router_topk_per_layer: list[int] | None = None
    moe_first_k_dense_layers: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_dtype: str = "fp32"
    moe_router_enable_expert_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what other keys decide."""
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.moe_ffn_hidden_size = self.moe_ffn_hidden_size or self.intermediate_size
        self.mechanisms = self.mechanisms or {}
        for (field, value), name in FORMER_FIELDS.items():
            if getattr(self, field) == value:
                setattr(self, field, getattr(type(self), field))
                self.mechanisms = {**self.mechanisms, name: {}}
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.layer_types = [
            "sliding_attention" if self.is_windowed(layer) else "full_attention"
            for layer in range(self.num_hidden_layers)
        ]
        super().__post_init__(**kwargs)

    def is_windowed(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) attends within the window."""
        skip = self.window_attn_skip_freq
        return self.sliding_window is not None and not (skip and (layer + 1) % skip == 0)

    def is_rotated(self, layer: int) -> bool:
        """Whether queries and keys of layer `layer` (from 0) know positions."""
        return self.no_rope_freq is None or not self.no_rope_freq[layer]

    def is_post_norm(self, layer: int) -> bool:
        """Whether layer `layer` normalises the sum of residual stream and branch."""
        post_layers = int(self.mix_post_fraction * self.num_hidden_layers)
        return self.norm_placement == "post" or (self.norm_placement == "mix" and layer < post_layers)

    def has_input_norm(self, layer: int) -> bool:
        """Whether layer `layer` normalises what its branches get."""
        return self.norm_placement != "branch" and not self.is_post_norm(layer)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has experts."""
        return self.num_moe_experts is not None and layer >= self.moe_first_k_dense_layers

    def topk(self, layer: int) -> int:
        """Experts that a token of layer `layer` uses."""
        return self.moe_router_topk_per_layer[layer] if self.moe_router_topk_per_layer else self.moe_router_topk

    def norm_scale(self, layer: int) -> float:
        """Factor of LayerNorm scaling in layer `layer`."""
        return (layer + 1) ** -0.5 if self.layernorm_scaling else 1.0
