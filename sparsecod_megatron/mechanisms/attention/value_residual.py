"""Value residual (ResFormer): a layer attends over its own values mixed with those of the first layer.

    V_l ← own · V_l + first · V_1        in layers start_layer … L - 1 (from 0), before attention

½ and ½ is Identity-ResFormer, other constants Constant-ResFormer, numbers in the last layers alone Sparse-ResFormer;
`learn` trains both numbers of each layer, freely (no sigmoid), from there: Learnable-ResFormer, which begins at ½. With
own = 0 and first = 1 attention has SVFormer's function, whose later layers have no value projection at all; here they
have, and it is idle. No gradient is stopped: V_1 learns from every layer.

V_1 travels as Megatron-Core's `context`, which the decoder hands from layer to layer: so it is an input and an output
of what full recompute computes again, and its gradient comes through. A rank's heads mix with the same heads, its
tokens with themselves, so tensor, sequence and context parallelism exchange nothing but gradients of learned numbers.

Source: Zhou et al., Value Residual Learning (arXiv 2410.17897), whose public code has constants of ½; names and first
values of the variants from public re-implementations, since the paper's text could not be read. It numbers the factors
the other way round (λ_1 on V_1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS, ParameterKind
from sparsecod_megatron.mechanisms.attention.value_residual_sparsecod import ValueMix
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


@dataclass
class ValueResidual(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "value_residual"
    shapes_weights: ClassVar[bool] = True

    own: float = at_least(0, 0.5)
    """Factor on a layer's own values, or what a learned one begins at."""
    first: float = at_least(0, 0.5)
    """Factor on the first layer's, likewise."""
    learn: bool = False
    """Whether both are learned in each layer."""
    start_layer: int = at_least(1, 1)
    """First layer (from 0) that mixes."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No layer that mixes, stages that V_1 would have to travel between, and others that need its way."""
        model, pipeline = config.model, config.parallel.pipeline_model_parallel_size
        yield from latent_conflict(self, config.model, "mixes the values of ordinary attention; remove one of them")
        if self.start_layer >= model.num_layers:
            yield (
                f"{self.key('start_layer')}: {self.start_layer}, but model.num_layers={model.num_layers} has layers "
                f"0 … {model.num_layers - 1}; lower it"
            )
        if pipeline > 1:
            yield (
                f"parallel.pipeline_model_parallel_size: {pipeline}, but mechanisms.{self.name} has no message for the "
                "first layer's values between stages; set it to 1"
            )
        for other in config.mechanisms.values():
            if other.token_halo(model) is not None:
                yield f"mechanisms.{other.name}: its token ids take the way of mechanisms.{self.name}; keep one of them"
        if config.megatron.get("fused_single_qkv_rope"):
            yield f"megatron.fused_single_qkv_rope: true hides the values from mechanisms.{self.name}; remove it"

    def mixes(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) takes the first one's values."""
        return layer >= self.start_layer

    def layers_differ(self, model: ModelConfig) -> bool:
        """The first layer learns no factors."""
        return self.learn

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Both factors."""
        if self.learn and self.mixes(layer):
            yield ParameterKind("value_residual", (2,), r"self_attention\.value_mix\.weight", NEVER_DECAYS)

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """A layer that hands the first values on, and an attention that gives or takes them."""
        spec.module = mixed(ValueLayer, spec.module)
        attention = spec.submodules.self_attention
        attention.module = mixed(ValueAttention, attention.module)
        mix = partial(ValueMix, self.own, self.first, self.learn) if self.mixes(site.layer) else None
        attention.params = {**attention.params, "value_mix": mix}
        return spec

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Learned: V_1 and what is mixed, beside the mixture. By constants: the mixture in place of the values."""
        token = rank.tokens * model.head_dim * rank.value_bytes // rank.tensor
        values, queries = token * model.query_groups, token * model.num_attention_heads
        whole = queries + 2 * values + (queries if model.attention_output_gate == "elementwise" else 0)
        if self.learn:
            kept = values if layer == 0 or self.mixes(layer) else 0
            if rank.is_reference and rank.context > 1 and self.mixes(layer):
                kept = whole  # of which the values are a view
        elif rank.is_reference and rank.context == 1 and self.mixes(layer):
            # The projection is counted as kept for its values; norms of queries and keys in fp32 keep it too.
            kept = values if model.qk_norm and rank.value_bytes == 4 else values - whole
        else:
            kept = 0
        return {"value_residual": kept} if kept else {}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> ValueResidual:
        """From the same depth on."""
        return replace(self, start_layer=max(1, self.start_layer * small.num_layers // model.num_layers))

    def export(self, model: ModelConfig) -> Module:
        """The same mix in attention of our own class."""
        layers = [layer for layer in range(model.num_layers) if self.learn and self.mixes(layer)]
        return Module(
            code=Path(__file__).with_name("value_residual_sparsecod.py"),
            settings=dataclasses.asdict(self),
            tensors=tuple(
                ExportedTensor(
                    f"decoder.layers.{layer}.self_attention.value_mix.weight",
                    f"model.layers.{layer}.self_attn.value_mix.weight",
                    (2,),
                )
                for layer in layers
            ),
        )


class ValueLayer:
    """Mixed into a transformer layer: `context` is V_1, which the first layer begins and the others hand on."""

    def forward(self, hidden_states: Tensor, *arguments: Any, context: Tensor | None = None, **options: Any) -> Any:
        """The layer's, on [S_local, B, H]; `context` is [S, B, groups/TP, D], of this rank's chunk of a sequence."""
        layer: Any = self
        parent: Any = super()
        layer.self_attention.first_values = context
        try:
            output, _ = parent.forward(hidden_states, *arguments, **options)
            return output, layer.self_attention.first_values
        finally:
            # What is computed again outside of its layer finds none, and raises.
            layer.self_attention.first_values = None


class ValueAttention:
    """Mixed into a self-attention.

    Args:
        *arguments: the attention's.
        value_mix: makes the layer's; None in layers that do not mix.
        **options: the attention's others.

    Attributes:
        first_values: V_1 while the layer's forward pass runs.
    """

    first_values: Tensor | None = None

    def __init__(self, *arguments: Any, value_mix: Callable[[], ValueMix] | None = None, **options: Any) -> None:
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        super().__init__(*arguments, **options)
        attention: Any = self
        attention.value_mix = None if value_mix is None else value_mix().to(attention.config.params_dtype)
        if attention.value_mix is not None:
            # Ranks hold other heads, whose gradients are summed; so no mark of sequence parallelism sums them again.
            attention.value_mix.shared = partial(copy_to_tensor_model_parallel_region, group=attention.pg_collection.tp)

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> Any:
        """The attention's, [S, B, heads/TP, D] each and a gate where it has one, with mixed values."""
        attention: Any = self
        parent: Any = super()
        query, key, value, *gate = parent.get_query_key_value_tensors(*arguments, **options)
        if attention.layer_number == 1:
            # A copy: a view would keep the whole projection where V_1 is kept.
            attention.first_values = value.contiguous()
        elif attention.value_mix is not None:
            assert attention.first_values is not None, "V_1 is there while the layer's forward pass runs"
            value = attention.value_mix(value, attention.first_values)
        return (query, key, value, *gate)
