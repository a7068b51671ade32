"""Phi-3: Llama with fused projections, of whose channels a share may rotate.

The files hold query, key and value projections above each other in one matrix, and gate above up projection. Factors of
`longrope` change with the length of the sequence, which has no counterpart in Megatron-Core: it is refused.

Source: transformers, models/phi3/modeling_phi3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Phi3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.entries import dense_entries
from sparsecod_megatron.hf.families.llama import PRE_NORM, dense_obstacle
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import stacked

FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""First of the matrices that are one in the files → its name."""


def _obstacle(model: ModelConfig) -> str | None:
    if model.rope_scaling != "none":
        return f"model.rope_scaling={model.rope_scaling}"
    return dense_obstacle(model)


def _layout(entry: Entry) -> Entry:
    module, _, projection = entry.hf[0].removesuffix(".weight").rpartition(".")
    if projection not in FUSED:
        return entry
    return Entry(entry.megatron, (f"{module}.{FUSED[projection]}.weight",), stacked(entry.transform))


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": fields["sliding_window"]}


PHI3 = Family(
    "Phi3ForCausalLM",
    Phi3Config,
    PRE_NORM | {"rotary_percent", "sliding_window"},
    _obstacle,
    dense_entries,
    _fields,
    _read,
    layout=_layout,
)
