"""Every head attends to its own pattern of blocks, and the heads together to everything.

With blocks of `block_size` tokens, key block j of query block i is visible to a head of key group g (from 0, over all
tensor-parallel ranks) if j ≤ i and

    i − j < local_blocks   or   (j + g) mod stride = 0

and within that causally. The blocks stand at absolute positions: a key that a head has let go of never comes back. The
number of key groups is a multiple of the stride, so that as many groups see each block and together they see all.

Where the mask would be large the visible blocks are gathered instead: one call of attention for blocks of queries, each
against a list of blocks as long as the longest.

Source: Lin et al., Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (arXiv
2407.17678); the rule as in linxihui/dkernel, `get_sparse_attn_mask`, whose step between heads is 1 where groups are at
least as many as the stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.seams.mechanism import LayerSite, Mechanism, Module, RankShape, latent_conflict, mixed

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

GATHERED_FROM = 1024
"""Tokens from which gathered blocks are faster than a mask on a CPU (docs/SPARSE_ATTENTION.md)."""


@dataclass
class S2Attention(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "s2_attention"

    block_size: int = at_least(1, 64)
    """Tokens of a block."""
    local_blocks: int = at_least(1, 2)
    """Latest blocks that every head sees, its own among them."""
    stride: int = at_least(1, 4)
    """Earlier blocks are seen by one key group in as many; 1 leaves attention as it is."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers (from 0) whose attention stays as it is."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Heads that together do not see everything, and attention that has no place for a mask."""
        model, key = config.model, self.key("stride")
        yield from latent_conflict(self, config.model, "attends with ordinary heads; remove one of them")
        if model.query_groups % self.stride:
            yield (
                f"{key}: {self.stride} does not divide model.num_query_groups={model.query_groups}, so some blocks "
                "would have fewer heads than others, or none; give a divisor"
            )
        for layer in self.dense_layers:
            if not 0 <= layer < model.num_layers:
                yield (
                    f"{self.key('dense_layers')}: {layer} is not below model.num_layers={model.num_layers}; remove it"
                )
        if model.softmax_type != "vanilla":
            yield f"model.softmax_type: {model.softmax_type}, but mechanisms.{self.name} has no sinks; set vanilla"
        if model.sliding_window is not None:
            yield f"model.sliding_window: {model.sliding_window} beside mechanisms.{self.name}; keep one of them"
        if config.data.reset_attention_mask:
            yield (
                f"data.reset_attention_mask: true, but mechanisms.{self.name} counts blocks from a sequence's start; "
                "leave one of them out"
            )
        for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
            if config.megatron.get(name):
                yield f"megatron.{name}: true, but mechanisms.{self.name} attends without Transformer Engine; remove it"

    def is_sparse(self, layer: int) -> bool:
        """Whether it changes layer `layer` (from 0)."""
        return self.stride > 1 and layer not in self.dense_layers

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Core attention with the pattern; Transformer Engine's takes no mask of each head, so torch's replaces it."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from sparsecod_megatron.model.attention import ContextParallelSDPAttention, SDPAttention

        if self.is_sparse(site.layer):
            places = spec.submodules.self_attention.submodules
            core = places.core_attention
            if not (isinstance(core, type) and issubclass(core, SDPAttention)):
                core = ContextParallelSDPAttention if site.megatron.context_parallel_size > 1 else SDPAttention
            places.core_attention = ModuleSpec(mixed(SeesBlocks, core), {"pattern": self})
        return spec

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """The mask as numbers; or the gathered blocks with theirs, and queries and output in the blocks' order."""
        if not self.is_sparse(layer):
            return {}
        heads, groups = model.num_attention_heads // rank.tensor, max(1, model.query_groups // rank.tensor)
        queries = rank.seq_length // rank.context
        if rank.context > 1:  # a mask for all heads is counted
            return {"attention_mask": (heads - 1) * queries * rank.seq_length * rank.value_bytes}
        if not self.gathers(rank.seq_length):
            return {"attention_mask": heads * queries * rank.seq_length * rank.value_bytes}
        longest = int(self.visible_blocks(queries // self.block_size, range(groups)).sum(-1).max()) * self.block_size
        gathered = 2 * groups * (queries // self.block_size) * longest * model.head_dim * (rank.tokens // queries)
        reordered = 2 * rank.tokens * heads * model.head_dim
        return {"attention_blocks": (gathered + reordered + heads * queries * longest) * rank.value_bytes}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> S2Attention:
        """Blocks of four tokens, and a stride that divides the small model's key groups."""
        layers = [layer for layer in self.dense_layers if layer < small.num_layers]
        return replace(
            self, block_size=4, local_blocks=1, stride=math.gcd(self.stride, small.query_groups), dense_layers=layers
        )

    def export(self, model: ModelConfig) -> Module:
        """The same weights, and the same pattern in the attention mask."""
        names = ("block_size", "local_blocks", "stride", "dense_layers")
        settings = {name: getattr(self, name) for name in names}
        return Module(code=Path(__file__).with_name("s2_attention_sparsecod.py"), settings=settings)

    def gathers(self, length: int) -> bool:
        """Whether blocks of a whole sequence are gathered, rather than masked."""
        return length >= GATHERED_FROM and length % self.block_size == 0

    def visible_blocks(self, num_blocks: int, groups: Any) -> Tensor:
        """Whether key blocks are visible to query blocks, `[groups, num_blocks, num_blocks]` bool.

        Args:
            num_blocks: of a sequence.
            groups: numbers of key groups over all ranks.
        """
        positions = torch.arange(num_blocks) * self.block_size
        numbers = torch.as_tensor(list(groups))
        causal = positions[:, None] >= positions
        return causal & self.sees(positions, positions, numbers)

    def sees(self, queries: Tensor, keys: Tensor, groups: Tensor) -> Tensor:
        """The rule without causality: positions `[queries]` and `[keys]`, numbers `[groups]` → `[groups, …, …]`."""
        query_blocks, key_blocks = queries // self.block_size, keys // self.block_size
        local = query_blocks[:, None] - key_blocks < self.local_blocks
        return local | ((key_blocks + groups[:, None]) % self.stride == 0)[:, None]


class SeesBlocks:
    """What a core attention becomes: each head of it sees its own blocks.

    Args:
        *arguments: the attention's.
        pattern: the mechanism.
        config: the model's.
        pg_collection: the run's groups: `tp` says which heads these are.
        **options: the attention's others.
    """

    def __init__(
        self, config: TransformerConfig, *arguments: Any, pattern: S2Attention, pg_collection: Any, **options: Any
    ) -> None:
        super().__init__(config, *arguments, pg_collection=pg_collection, **options)  # type: ignore[call-arg]
        self.pattern = pattern
        size, rank = pg_collection.tp.size(), pg_collection.tp.rank()
        heads = config.num_attention_heads // size
        share = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
        self.groups = [head // share for head in range(rank * heads, (rank + 1) * heads)]
        """Key group of each head of this rank, numbered over all ranks."""
        self.is_whole = pg_collection.cp.size() == 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """query [S/CP, B, heads/TP, D], key and value [S/CP, B, groups/TP, D] → [S/CP, B, heads/TP · D]."""
        dropout: float = self.dropout if self.training else 0.0  # type: ignore[attr-defined]
        if dropout or not self.is_whole or not self.pattern.gathers(query.shape[0]):
            parent: Any = super()
            attended: Tensor = parent.forward(query, key, value, *arguments, **options)
            return attended
        return self._gathered(query, key, value)

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in the parent, with a mask of each head, [heads/TP, S, S_key]."""
        parent: Any = super()
        key, value, mask = parent.visible(query, key, value)
        if mask is None:
            positions = torch.arange(query.shape[0], device=query.device)
            mask = self.allowed(positions, positions)
        return key, value, mask

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Whether each query [S] of a head sees each key [S_key]: [heads/TP, S, S_key], bool."""
        parent: Any = super()
        causal: Tensor = parent.allowed(query_positions, key_positions)
        groups = torch.tensor(self.groups, device=query_positions.device)
        return causal & self.pattern.sees(query_positions, key_positions, groups)

    def _gathered(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every block of queries against the blocks that it sees, one call; heads of a key group lie side by side."""
        length, batch, heads, width = query.shape
        groups, size = key.shape[2], self.pattern.block_size
        count, shared = length // size, heads // groups
        blocks = self.pattern.visible_blocks(count, self.groups[::shared]).to(query.device)
        longest = int(self.pattern.visible_blocks(count, self.groups[::shared]).sum(-1).max())
        chosen = blocks.int().argsort(dim=-1, descending=True, stable=True)[..., :longest]  # [groups, blocks, longest]
        is_seen = blocks.gather(-1, chosen)
        within = torch.arange(size, device=query.device)
        positions = (chosen[..., None] * size + within).flatten(2)  # of gathered keys, [groups, blocks, longest · size]
        queries = (torch.arange(count, device=query.device)[:, None] * size + within)[None, :, :, None]
        mask = (positions[:, :, None] <= queries) & is_seen.repeat_interleave(size, -1)[:, :, None]
        places = torch.arange(groups, device=query.device)[:, None, None], chosen

        def gathered(x: Tensor) -> Tensor:  # [S, B, groups, D] → [B, groups · blocks, longest · size, D]
            apart = x.unflatten(0, (count, size)).permute(2, 3, 0, 1, 4)
            return apart[:, places[0], places[1]].flatten(3, 4).flatten(1, 2)

        folded = query.view(count, size, batch, groups, shared, width).permute(2, 3, 0, 4, 1, 5)
        attended = F.scaled_dot_product_attention(
            folded.flatten(3, 4).flatten(1, 2),
            gathered(key),
            gathered(value),
            attn_mask=mask.repeat(1, 1, shared, 1).flatten(0, 1)[None],
            scale=self.softmax_scale,  # type: ignore[attr-defined]
        )
        apart = attended.view(batch, groups, count, shared, size, width)
        return apart.permute(2, 4, 0, 1, 3, 5).reshape(length, batch, heads * width)
