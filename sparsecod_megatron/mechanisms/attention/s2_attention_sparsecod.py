"""Blocks that each head of an exported model sees, as `s2_attention.py` trains them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

_WITHOUT_MASK = ("flash", "flex")


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Hide from each head of a layer what its pattern leaves out."""
    if settings["stride"] > 1 and index not in settings["dense_layers"]:
        layer.self_attn.register_forward_pre_hook(partial(_hide, settings))


def _hide(settings: dict[str, Any], module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, rotation, mask, cache = (*inputs, None)[:4]
    if any(kind in module.config._attn_implementation for kind in _WITHOUT_MASK):
        raise ValueError(
            f"attn_implementation={module.config._attn_implementation}: s2_attention needs a mask of each head; use "
            "sdpa or eager"
        )
    past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
    num_keys = past + x.shape[1] if mask is None else mask.shape[-1]
    queries, keys = torch.arange(past, past + x.shape[1], device=x.device), torch.arange(num_keys, device=x.device)
    visible = (keys <= queries[:, None])[None, None] if mask is None else _is_visible(mask)
    # Padding on the left moves the blocks with the tokens: the last query sees no key before the first.
    padding = visible[:, :1, -1:].int().argmax(-1, keepdim=True)
    query_blocks, key_blocks = ((at - padding) // settings["block_size"] for at in (queries[:, None], keys))
    heads = torch.arange(module.config.num_attention_heads, device=x.device) // module.num_key_value_groups
    kept = (query_blocks - key_blocks < settings["local_blocks"]) | (
        (key_blocks + heads[:, None, None]) % settings["stride"] == 0
    )
    if mask is None or mask.dtype == torch.bool:
        return (x, rotation, visible & kept, cache)
    return (x, rotation, mask.masked_fill(~kept, torch.finfo(mask.dtype).min), cache)


def _is_visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
