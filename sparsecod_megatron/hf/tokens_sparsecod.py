"""Token ids for layers of the `sparsecod` architecture that read them, with those before them from the cache.

Copied as it is into an export. The ids lie in the cache as one more layer of it, so that whatever reorders, repeats or
crops keys and values (beam search, assisted decoding) does the same to them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

NO_TOKEN = -1
"""Id of padding, and before the beginning."""


def token_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
    *,
    halo: int,
    num_layers: int,
) -> Tensor:
    """Ids and positions of these tokens and of the `halo` before them.

    Args:
        input_ids: [batch, seq].
        attention_mask: 1 where there is a token, [batch, seen + seq]; of other shapes it says nothing of tokens.
        position_ids: in the document, [batch or 1, seq].
        cache: with what has been seen; gets these tokens too.
        halo: tokens before these.
        num_layers: of the model.

    Returns:
        [batch, halo + seq, 2], int64.

    Raises:
        ValueError: there are embeddings alone, or a cache that cannot hold ids.
    """
    if input_ids is None:
        raise ValueError("layers of this model look token ids up; give input_ids, not inputs_embeds")
    ids, length = input_ids, input_ids.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        ids = ids.masked_fill(attention_mask[:, -length:] == 0, NO_TOKEN)
    tokens = torch.stack((ids, position_ids.expand_as(ids)), dim=-1)
    if halo and cache is not None:
        tokens = _with_earlier(tokens, cache, num_layers)[:, -(halo + length) :]
    missing = halo + length - tokens.shape[1]
    before = torch.stack([torch.full_like(ids[:, :1], NO_TOKEN), torch.zeros_like(ids[:, :1])], dim=-1)
    return torch.cat((before.expand(-1, missing, -1), tokens), dim=1) if missing else tokens


def _with_earlier(tokens: Tensor, cache: Cache, num_layers: int) -> Tensor:
    """All tokens so far, [batch, seen + seq, 2]."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"layers of this model read earlier token ids, which {type(cache).__name__} cannot hold; use a "
            "DynamicCache, or use_cache=False"
        )
    if cache.layer_class_to_replicate is None and len(cache.layers) == num_layers:
        cache.layers.append(DynamicLayer())
    kept, _ = cache.update(tokens.unsqueeze(1), tokens[:, None, :, :0], num_layers)
    return kept[:, 0]
