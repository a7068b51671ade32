"""The `sparsecod` architecture: a causal language model with every variant of the model family.

Copied as it is into an export, so it imports nothing of this package but its neighbours. With N a norm, f attention or
MLP, and s = 1 / sqrt(layer + 1) under LayerNorm scaling (1 otherwise), a branch joins the residual stream as

    pre              x + m · f(s · N(x))      m = residual_multiplier
    parallel         x + attention(s · N(x)) + mlp(s · N'(x)) in one layer
    post             N(x + f(x))
    peri, sandwich   x + s · N'(f(N(x)))
    branch           x + s · N(f(x))
    mix              post in the first layers, pre in the others

where a mechanism may have another state than the stream x, wider by streams or slots, which f reads and joins by its
own formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention_sparsecod import SparsecodAttention
from .configuration_sparsecod import SparsecodConfig
from .extensions_sparsecod import EXTENSIONS
from .moe_sparsecod import SparsecodMLP, SparsecodMoE
from .norms_sparsecod import NORMS
from .rotary_sparsecod import Rotation, SparsecodRotaryEmbedding
from .tokens_sparsecod import token_inputs

# transformers 5.24 renamed `past_key_values`; an export is loaded by whichever version its user has.
_OUTPUTS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"


class SparsecodConnection(nn.Module):
    """How a branch reads the residual state and joins it: by a mechanism's modules, or as the plain stream."""

    def __init__(self, read: nn.Module | None = None, write: nn.Module | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.read, self.write, self.factor = read, write, factor

    def forward(self, state: Tensor) -> Tensor:
        """State → what the branch's norm gets, [batch, seq, hidden]."""
        return state if self.read is None else self.read(state)

    def join(self, branch: Tensor, state: Tensor) -> Tensor:
        """[batch, seq, hidden] and the state → the next state."""
        if self.write is not None:
            return self.write(branch, state)
        return state + (branch if self.factor == 1.0 else self.factor * branch)


class SparsecodLayer(nn.Module):
    """Attention and MLP, each joined to the residual stream as the placement of norms has it."""

    def __init__(self, config: SparsecodConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_post_norm, self.is_parallel = config.is_post_norm(layer_idx), config.norm_placement == "parallel"
        has_branch_norm = config.norm_placement in ("peri", "sandwich", "branch")
        has_input_norm = config.has_input_norm(layer_idx)
        scale = config.norm_scale(layer_idx)

        def norm(present: bool, scale: float = 1.0) -> nn.Module | None:
            return NORMS[config.normalization](config.hidden_size, config, scale) if present else None

        self.self_attn = SparsecodAttention(config, layer_idx)
        is_moe = config.is_moe_layer(layer_idx)
        self.mlp = SparsecodMoE(config, layer_idx) if is_moe else SparsecodMLP(config, config.intermediate_size)
        has_join_norm, before = self.is_post_norm or has_branch_norm, 1.0 if has_branch_norm else scale
        self.input_layernorm = norm(has_input_norm, before)
        self.attention_join_norm = norm(has_join_norm, scale)
        self.post_attention_layernorm = norm(has_input_norm, before)
        self.mlp_join_norm = norm(has_join_norm, scale)
        # Of mechanisms: what is added to the layer's input, and how many tokens before its own the layer reads the ids
        # of, None: it reads no ids.
        self.memory: nn.Module | None = None
        self.token_halo: int | None = None
        # Whether all layers get the values of this one, the first.
        self.shares_values = False
        # A mechanism's path, with what stands before the first layer and behind the last.
        self.attention_residual, self.mlp_residual = (
            SparsecodConnection(factor=config.residual_multiplier) for _ in range(2)
        )
        self.path: Any = None
        self.expansion: nn.Module | None = None
        self.contraction: nn.Module | None = None
        for name, settings in config.mechanisms.items():
            if name not in EXTENSIONS:
                raise ValueError(f"mechanisms: {name} is not known here; use the code that lies beside the weights")
            EXTENSIONS[name](self, settings, config, layer_idx)

    def connect(self, kind: type, settings: dict[str, Any], config: SparsecodConfig, layer_idx: int) -> None:
        """Read and join by a residual path, a class of a mechanism's code that is built from its settings."""
        last = config.num_hidden_layers - 1
        sizes = {"hidden_size": config.hidden_size, "num_layers": last + 1, "eps": config.rms_norm_eps}
        self.path = path = kind(settings, **sizes)
        self.attention_residual, self.mlp_residual = (
            SparsecodConnection(path.read(branch), path.join(branch)) for branch in (2 * layer_idx, 2 * layer_idx + 1)
        )
        self.expansion = path.expansion() if layer_idx == 0 else None
        self.contraction = path.read(2 * last + 2) if layer_idx == last else None

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None,
        cache: Cache | None,
        tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """State → state, [batch, seq, hidden] or wider; `tokens` as `token_inputs` gives them."""
        if self.memory is not None:
            x = x + self.memory(x, tokens)

        def attention(x: Tensor) -> Tensor:
            return self.self_attn(x, rotation, mask, cache, **kwargs)[0]

        def mlp(x: Tensor) -> Tensor:
            return self.mlp(x, tokens) if getattr(self.mlp, "reads_tokens", False) else self.mlp(x)

        between = self._joined(x, x, attention, self.attention_residual, self.input_layernorm, self.attention_join_norm)
        given = x if self.is_parallel else between
        return self._joined(given, between, mlp, self.mlp_residual, self.post_attention_layernorm, self.mlp_join_norm)

    def values(self, state: Tensor) -> Tensor:
        """What its attention computes of a state as values, [batch, seq, key_value_heads, head_dim]."""
        x = self.attention_residual(state)
        x = x if self.input_layernorm is None else self.input_layernorm(x)
        return self.self_attn.v_proj(x).unflatten(-1, (-1, self.self_attn.head_dim))

    def _joined(
        self,
        given: Tensor,
        state: Tensor,
        branch: Callable[[Tensor], Tensor],
        residual: SparsecodConnection,
        before: nn.Module | None,
        norm: nn.Module | None,
    ) -> Tensor:
        """What the state becomes by a branch of what is given, the state itself but in a parallel layer."""
        x = residual(given)
        output = branch(x if before is None else before(x))
        if norm is None:
            return residual.join(output, state)
        return norm(residual.join(output, state)) if self.is_post_norm else residual.join(norm(output), state)


class SparsecodPreTrainedModel(PreTrainedModel):
    """What transformers asks of every class of an architecture."""

    config_class = SparsecodConfig
    base_model_prefix = "model"
    _no_split_modules = ["SparsecodLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @property
    def _supports_sdpa(self) -> bool:
        """Not with sinks, which torch's function has no place for."""
        return self.config.softmax_type == "vanilla"

    _supports_flash_attn = _supports_sdpa


class SparsecodModel(SparsecodPreTrainedModel):
    """Embeddings, layers, final norm."""

    def __init__(self, config: SparsecodConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        norm = NORMS[config.normalization]
        self.embedding_norm = norm(size, config) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(SparsecodLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(size, config) if config.final_norm else nn.Identity()
        self.rotary_emb = SparsecodRotaryEmbedding(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids or embeddings to the last hidden state [batch, seq, hidden].

        `hidden_states` are the layers' inputs, and the output after the final norm, as everywhere in transformers; with
        a residual path of a mechanism the inputs are its state, which may be wider than the output.
        `cache` and `past_key_values` are the two names that transformers' versions have for one argument.

        Raises:
            TypeError: an argument that would be ignored.
            ValueError: neither token ids nor embeddings are given, or both.
        """
        _refuse_ignored(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(embedded.shape[1], device=embedded.device) + seen).unsqueeze(0)
        masks = self._masks(embedded, attention_mask, cache, position_ids)
        tokens = self._tokens(input_ids, attention_mask, cache, position_ids)
        rotations = {kind: self.rotary_emb(position_ids, embedded.dtype, kind) for kind in masks}
        factor = self.config.embedding_multiplier
        scaled = embedded if factor == 1.0 else embedded * embedded.new_tensor(factor)
        x, streams = self._first(self.embedding_norm(scaled)), []
        # Apart from the first layer's own pass, so that a layer has one output, and is a function of what it is given.
        first: Any = self.layers[0]
        shared = {"first_values": first.values(x)} if first.shares_values else {}
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            streams.append(x)
            x = layer(x, rotations[kind], masks[kind], cache, **tokens, **shared)
        x = self.norm(self._last(x))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*streams, x) if wanted else None,
            **{CACHE: cache},
        )

    def _first(self, embedded: Tensor) -> Tensor:
        """The first residual state."""
        expansion: Any = self.layers[0].expansion
        return embedded if expansion is None else expansion(embedded)

    def _last(self, state: Tensor) -> Tensor:
        """What the final norm gets."""
        contraction: Any = self.layers[-1].contraction
        return state if contraction is None else contraction(state)

    def _tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """What layers that read token ids get; nothing where none does."""
        layers: list[Any] = list(self.layers)
        halos = [layer.token_halo for layer in layers if layer.token_halo is not None]
        if not halos:
            return {}
        ids = token_inputs(input_ids, attention_mask, position_ids, cache, halo=max(halos), num_layers=len(layers))
        return {"tokens": ids}

    def _masks(
        self, embedded: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
    ) -> dict[str, Tensor | None]:
        given = {"config": self.config, "inputs_embeds": embedded, "attention_mask": attention_mask}
        given |= {CACHE: cache, "position_ids": position_ids}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {kind: maker(**given) for kind, maker in makers.items() if kind in self.config.layer_types}


def _refuse_ignored(arguments: dict[str, Any]) -> None:
    """A keyword of a later transformers must not vanish here: the cache did when 5.24 renamed it."""
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    ignored = [name for name in given if name != "cache_position"]  # earlier versions' duplicate of position_ids
    if ignored:
        raise TypeError(f"sparsecod models have no argument {', '.join(ignored)}; leave it out")


class SparsecodForCausalLM(SparsecodPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SparsecodConfig) -> None:
        super().__init__(config)
        self.model = SparsecodModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids to logits [batch, seq, vocabulary], and the next-token loss where labels are given.

        `num_items_in_batch` counts the labels of all micro-batches, by which transformers' Trainer has the sum divided.
        """
        outputs = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        logits = logits if self.config.logits_scaling == 1.0 else logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            counted = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **counted)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )
