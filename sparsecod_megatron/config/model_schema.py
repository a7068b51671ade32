"""The keys of the model family: shape, norms, attention, MLP, experts, initialisation.

docs/MODEL.md gives the formula and the source of every variant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsecod_megatron.config.fields import above, at_least, between, choice, from_to_below

ACTIVATIONS_WITH_GATE = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")
"""Activations of an MLP with two input projections."""


@dataclass
class InitStdConfig:
    """Standard deviations that replace `init`'s for one kind of matrix; None keeps it."""

    embedding: float | None = at_least(0, None)
    qkv: float | None = at_least(0, None)
    """Query, key and value (and gate) projections."""
    attention_output: float | None = at_least(0, None)
    mlp_input: float | None = at_least(0, None)
    """Gate and up projections, of experts too."""
    mlp_output: float | None = at_least(0, None)
    router: float | None = at_least(0, None)
    output: float | None = at_least(0, None)
    """The output layer, if untied."""


@dataclass
class ModelConfig:
    """The transformer.

    Defaults that are None are derived when the file is read: `num_query_groups` = `num_attention_heads` (MHA),
    `kv_channels` = `hidden_size / num_attention_heads`, `moe_ffn_hidden_size` = `ffn_hidden_size`. `vocab_size` comes
    from the tokenizer, rounded up to `make_vocab_size_divisible_by` whatever the layout, so that every layout trains
    and exports the same tensors.
    """

    preset: str | None = None
    """Name of a model of the paper or of a small one (`dense-1B`, `nano-dense`, …); other keys win over it."""

    num_layers: int = at_least(1, 12)
    hidden_size: int = at_least(1, 768)
    ffn_hidden_size: int = at_least(1, 2048)
    num_attention_heads: int = at_least(1, 12)
    num_query_groups: int | None = at_least(1, None)
    kv_channels: int | None = at_least(2, None)
    vocab_size: int | None = at_least(1, None)
    make_vocab_size_divisible_by: int = at_least(1, 128)
    untie_embeddings_and_output_weights: bool = True
    hidden_dropout: float = from_to_below(0, 1, 0.0)
    attention_dropout: float = from_to_below(0, 1, 0.0)

    normalization: str = choice("RMSNorm", "LayerNorm")
    """What all norms are but those of queries and keys; LayerNorm takes the mean off and has a bias."""
    layernorm_epsilon: float = at_least(0, 1e-5)
    layernorm_zero_centered_gamma: bool = False
    """Norms multiply by 1 + weight, in fp32; their weights start at zero, and decay towards a factor of one."""
    embedding_multiplier: float = above(0, 1.0)
    """Factor on the embeddings, before `embedding_norm`; rounded to the type of the run, as Gemma has it."""
    residual_multiplier: float = above(0, 1.0)
    """Factor on what each branch adds to the residual stream; `pre` only."""
    logits_scaling: float = above(0, 1.0)
    """Divisor of the logits."""
    norm_placement: str = choice("pre", "parallel", "post", "peri", "sandwich", "branch", "mix")
    mix_post_fraction: float = between(0, 1, 0.25)
    """`mix`: share of the layers, from the first on, that are post-norm; the others are pre-norm."""
    layernorm_scaling: bool = False
    """Norms of layer l times 1 / sqrt(l + 1): the input norms of `pre` and `parallel`, else the output norms."""
    embedding_norm: bool | None = None
    """A norm on the embeddings; None is true for `peri`, as its paper has it, and false otherwise."""
    final_norm: bool = True
    qk_norm: bool = False
    """A norm over the channels of queries and keys, before rotation."""
    qk_norm_scope: str = choice("head", "projection")
    """Whether it is over the channels of each head, or over those of all heads together."""

    rotary_base: int = at_least(1, 10000)
    rotary_percent: float = field(default=1.0, metadata={"above": 0, "maximum": 1})
    """Share of each head's channels, from the first on, that rotate; the others know no position."""
    rope_scaling: str = choice("none", "linear", "llama3", "yarn")
    """How positions beyond the original length are reached; the factor and length below belong to it."""
    rope_scaling_factor: float = at_least(1, 8.0)
    rope_original_max_position_embeddings: int = at_least(1, 8192)
    """Sequence length before scaling (`llama3`, `yarn`)."""
    yarn_correction_range_round_to_int: bool = True
    """`yarn`: whether the channels between which frequencies change are whole numbers."""
    rotary_base_local: int | None = at_least(1, None)
    """Base of the layers within the window, which no scaling concerns; None: they rotate as the others."""
    no_rope_freq: list[int] | None = None
    """1 for each layer whose queries and keys do not rotate, 0 for the others; None: all layers rotate."""
    sliding_window: int | None = at_least(1, None)
    """Keys that a query sees, itself included; None: all before it."""
    window_attn_skip_freq: int | None = at_least(2, None)
    """Every n-th layer attends without the window; None: all layers have it."""
    softmax_scale: float | None = above(0, None)
    """Factor on the scores of attention; None is 1 / sqrt(channels of a head)."""
    softmax_type: str = choice("vanilla", "learnable")
    """`learnable`: each head has a sink, one more score in the softmax's sum, which no value belongs to."""
    attention_output_gate: str = choice("none", "elementwise")
    """Attention output times sigmoid of a projection of the layer's input, one value per channel."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections (and of the gate's)."""
    attention_output_bias: bool = False

    multi_latent_attention: bool = False
    """Heads are projected from small normalised latents of a token; the seven keys below belong to it."""
    q_lora_rank: int | None = at_least(1, None)
    """Channels of the latent of queries; None: they are projected from the layer's input, as ordinary ones are."""
    kv_lora_rank: int = at_least(1, 512)
    """Channels of the latent of keys and values."""
    qk_head_dim: int = at_least(1, 128)
    """Channels of a head's queries and keys that do not rotate."""
    qk_pos_emb_head_dim: int = at_least(2, 64)
    """Those that do, whose key all heads share."""
    v_head_dim: int = at_least(1, 128)
    """Channels of a head's values."""
    mscale: float = at_least(0, 1.0)
    """`yarn`: rotated channels times m(mscale) / m(mscale_all_dim), m(a) = 1 + 0.1 · a · log(rope_scaling_factor)."""
    mscale_all_dim: float = at_least(0, 0.0)
    """`yarn`: and scores times m(mscale_all_dim)²."""

    activation: str = choice("swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "gelu", "gelu_tanh", "relu", "relu2")
    activation_func_clamp_value: float = above(0, 7.0)
    """`clamped_swiglu`: what the gate is at most, and the up projection at most away from zero."""
    mlp_bias: bool = False
    """Biases of both matrices of MLPs, experts' too, and of routers."""

    num_moe_experts: int | None = at_least(1, None)
    """None is a dense model; the keys below then have no effect."""
    moe_router_topk: int = at_least(1, 2)
    moe_router_topk_per_layer: list[int] | None = None
    """Experts per token of each layer, in place of `moe_router_topk`; entries of dense layers are not read."""
    moe_first_k_dense_layers: int = at_least(0, 0)
    """First layers that keep a dense MLP of `ffn_hidden_size`."""
    moe_ffn_hidden_size: int | None = at_least(1, None)
    moe_shared_expert_intermediate_size: int | None = at_least(1, None)
    """Total width of the shared experts, added to the routed output; None: no shared expert."""
    moe_shared_expert_gate: bool = False
    """Shared experts' output times sigmoid of a projection of their input."""
    moe_router_score_function: str = choice("softmax", "sigmoid")
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k, not renormalised. False: top-k, then softmax over the chosen."""
    moe_router_topk_scaling_factor: float | None = at_least(0, None)
    """Factor on the chosen experts' weights."""
    moe_router_num_groups: int | None = at_least(1, None)
    """Groups of experts; each token may use `moe_router_group_topk` of them."""
    moe_router_group_topk: int | None = at_least(1, None)
    moe_router_dtype: str = choice("fp32", "fp64")
    moe_router_load_balancing_type: str = choice("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
    """What the auxiliary loss balances over: a micro-batch, a sequence, or the global batch."""
    moe_aux_loss_coeff: float = at_least(0, 1e-2)
    moe_z_loss_coeff: float = at_least(0, 1e-3)
    moe_router_enable_expert_bias: bool = False
    """A bias on the selection, not on the weights, adjusted each step against the load (aux-loss-free balancing)."""
    moe_router_bias_update_rate: float = at_least(0, 1e-3)
    moe_router_bias_zero_mean: bool = False
    """Whether the bias loses its mean over the experts after each step, which changes no choice and keeps it small."""
    moe_expert_capacity_factor: float | None = at_least(0, None)
    """Tokens an expert takes, over the even share of the micro-batch (of this rank); the least probable others are
    dropped. None drops no token."""

    init: str = choice("normal", "scaled", "mitchell", "small_init")
    """`normal`: every matrix N(0, init_method_std). `scaled`: output projections over sqrt(2 · num_layers).
    `mitchell`, `small_init`: by width and depth, init_method_std unused."""
    init_method_std: float = at_least(0, 0.02)
    init_std: InitStdConfig = field(default_factory=InitStdConfig)
    mup_base_hidden_size: int | None = at_least(1, None)
    """Width at which `init_method_std` and `lr` were tuned; both are rescaled to `hidden_size`. None: no rescaling."""

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def score_channels(self) -> int:
        """Channels of a head's queries and keys."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def value_channels(self) -> int:
        """Channels of a head's values."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def is_moe(self) -> bool:
        """Whether there are mixtures of experts."""
        return self.num_moe_experts is not None

    @property
    def is_gated(self) -> bool:
        """Whether the MLPs have a gate projection."""
        return self.activation in ACTIVATIONS_WITH_GATE

    @property
    def has_embedding_norm(self) -> bool:
        """Whether the embeddings are normalised."""
        return self.norm_placement == "peri" if self.embedding_norm is None else self.embedding_norm

    @property
    def has_branch_norm(self) -> bool:
        """Whether what branches add is normalised before it is added."""
        return self.norm_placement in ("peri", "sandwich", "branch")

    @property
    def is_parallel(self) -> bool:
        """Whether both branches of a layer read the layer's input."""
        return self.norm_placement == "parallel"

    @property
    def has_norm_biases(self) -> bool:
        """Whether norms add a bias."""
        return self.normalization == "LayerNorm"

    @property
    def norms_projections(self) -> bool:
        """Whether queries and keys are normalised over all their heads together."""
        return self.qk_norm and self.qk_norm_scope == "projection"

    @property
    def width_ratio(self) -> float:
        """Hidden size over the one that the hyperparameters were found at."""
        return self.hidden_size / (self.mup_base_hidden_size or self.hidden_size)

    def padded_vocab_size(self, tokenizer_size: int) -> int:
        """`tokenizer_size` rounded up to a multiple of `make_vocab_size_divisible_by`, the same under every layout."""
        multiple = self.make_vocab_size_divisible_by
        return (tokenizer_size + multiple - 1) // multiple * multiple

    def is_post_norm(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) normalises the sum instead of the branch's input."""
        post_layers = int(self.mix_post_fraction * self.num_layers)
        return self.norm_placement == "post" or (self.norm_placement == "mix" and layer < post_layers)

    def has_input_norm(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) normalises what its branches get."""
        return self.norm_placement != "branch" and not self.is_post_norm(layer)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts."""
        return self.is_moe and layer >= self.moe_first_k_dense_layers

    def topk(self, layer: int) -> int:
        """Experts that a token of layer `layer` (from 0) uses."""
        return self.moe_router_topk_per_layer[layer] if self.moe_router_topk_per_layer else self.moe_router_topk

    def scale(self, layer: int) -> float:
        """Factor of LayerNorm scaling in layer `layer` (from 0)."""
        return (layer + 1) ** -0.5 if self.layernorm_scaling else 1.0
