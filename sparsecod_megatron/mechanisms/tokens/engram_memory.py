"""Engram's memory as a module of Megatron-Core's: its tables and projections spread over tensor-parallel ranks.

A rank holds the same columns of every head's rows. What it looks up, laid out by column and then by head, is so a
contiguous part of the whole memory's channels, as a row-parallel projection takes it, under any tensor-parallel size.
Keys and values are summed over the ranks; with sequence parallelism each rank then keeps those of its tokens. The
convolution reads values alone, of the ids before a chunk too, so that context parallelism exchanges nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsecod_megatron.mechanisms.tokens.engram_sparsecod import (
    TAPS,
    gate_of,
    halo_of,
    multipliers,
    smoothed,
    table_rows,
)
from sparsecod_megatron.mechanisms.tokens.layer import own_tokens
from sparsecod_megatron.mechanisms.tokens.table import TokenTable
from sparsecod_megatron.seams.mechanism import mixed

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparsecod_megatron.mechanisms.tokens.engram import Engram
    from sparsecod_megatron.seams.mechanism import LayerSite


def memory_spec(settings: Engram, site: LayerSite) -> ModuleSpec:
    """The module for a layer, as `TokenLayer` builds it."""
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec

    linear, norm = site.provider.row_parallel_linear(), site.provider.layer_norm(rms_norm=True)
    params = {"settings": settings, "vocab_size": site.model.vocab_size, "linear": linear, "norm": norm}
    return ModuleSpec(mixed(EngramMemory, MegatronModule), {**params, "sizes": settings.sizes(site.layer)})


class EngramMemory:
    """gate · value + SiLU(convolution of normalised values), of what is stored for the n-grams of each token.

    Args:
        config: Megatron-Core's configuration of the model.
        layer_number: from 1.
        tp_group: ranks that share columns.
        settings: the mechanism.
        vocab_size: rows of the embedding.
        linear: row-parallel linear layer.
        norm: RMSNorm.
        sizes: rows of each head's table, by order.

    Attributes:
        canonical: id of a token → of all that are written alike, int32 [V]; a checkpoint keeps it.
        observe: called with the gates of each forward pass, [S_local, B, 1].
    """

    canonical: Tensor

    def __init__(
        self,
        *,
        config: Any,
        layer_number: int,
        tp_group: torch.distributed.ProcessGroup,
        settings: Engram,
        vocab_size: int,
        linear: Any,
        norm: Any,
        sizes: list[list[int]],
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        super().__init__(config)  # type: ignore[call-arg]
        module: Any = self
        self.tp_group, self.max_ngram, self.sizes = tp_group, settings.max_ngram, sizes
        self.factors = multipliers(settings.seed, layer_number - 1, settings.max_ngram, vocab_size)
        self.observe: Callable[[Tensor], None] | None = None
        # Sums of whole chunks, which are cut afterwards: the convolution needs neighbours.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        width = settings.width // settings.heads
        module.table = TokenTable(config, sum(map(sum, sizes)), width, tp_group)
        for name in ("key", "value"):
            projection = build_module(
                linear,
                settings.memory_width,
                config.hidden_size,
                config=whole,
                init_method=config.init_method,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name=name,
                tp_group=tp_group,
            )
            module.add_module(name, projection)
        norms = {"query_norm": copy.copy(config), "key_norm": whole, "value_norm": whole}
        for name, of in norms.items():
            of.normalization = "RMSNorm"  # which Transformer Engine's go by, whatever the model's are
            module.add_module(
                name, build_module(norm, config=of, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            )
        module.taps = torch.nn.Parameter(torch.zeros(TAPS * config.hidden_size, dtype=config.params_dtype))
        module.register_buffer("canonical", torch.arange(vocab_size, dtype=torch.int32))

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """[S_local, B, H] and ids as `model.tokens.token_context` makes them → [S_local, B, H].

        S_local is a tensor-parallel rank's part of the sequence under sequence parallelism. Collective (`tp_group`).
        """
        module: Any = self
        spread = module.config.sequence_parallel
        length = len(hidden_states) * (self.tp_group.size() if spread else 1)
        tokens = own_tokens(context, length, halo=halo_of(self.max_ngram))
        rows, valid = table_rows(tokens, self.canonical, self.factors, self.sizes)
        chunks, reach = len(tokens), self.max_ngram * (TAPS - 1)
        found = module.table(rows.flatten(0, 1)) * valid.flatten(0, 1)[..., None]
        memory = found.transpose(-1, -2).flatten(start_dim=-2)
        value = module.value(memory)[0].unflatten(0, (chunks, -1))
        earlier = smoothed(
            module.value_norm(value.flatten(0, 1)).view_as(value),
            module.taps,
            tokens[:, halo_of(self.max_ngram) :, :, 1],
            self.max_ngram,
        )
        own = memory.unflatten(0, (chunks, -1))[:, reach:].flatten(0, 1)
        key = module.key_norm(module.key(own)[0])
        parts = [key, value[:, reach:].flatten(0, 1), earlier.flatten(0, 1)]
        if spread:
            from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

            parts = [scatter_to_sequence_parallel_region(part, group=self.tp_group) for part in parts]
        key, value, earlier = parts
        gate = gate_of(module.query_norm(hidden_states), key)
        if self.observe is not None:
            self.observe(gate)
        return gate * value + earlier
