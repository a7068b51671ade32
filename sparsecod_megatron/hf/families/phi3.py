"""Phi-3: Llama with fused projections, of whose channels a share may rotate.

The files hold query, key and value projections above each other in one matrix, and gate above up projection. Factors of
`longrope` change with the length of the sequence, which has no counterpart in Megatron-Core: it is refused.

Source: transformers, models/phi3/modeling_phi3.py.
"""

from __future__ import annotations

from functools import partial

from transformers import Phi3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import PRE_NORM, dense_obstacle, read_window, window_fields
from sparsecod_megatron.hf.families.entries import dense_entries, renamed
from sparsecod_megatron.hf.transforms import stacked

FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""First of the matrices that are one in the files → its name."""


def _obstacle(model: ModelConfig) -> str | None:
    if model.rope_scaling != "none":
        return f"model.rope_scaling={model.rope_scaling}"
    return dense_obstacle(model)


PHI3 = Family(
    "Phi3ForCausalLM",
    Phi3Config,
    PRE_NORM | {"rotary_percent", "sliding_window"},
    _obstacle,
    dense_entries,
    window_fields,
    read_window,
    layout=partial(renamed, names=FUSED, change=stacked),
)
