"""Rotary embeddings and their scaling, in transformers' `rope_parameters` and in our keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError

LLAMA3_RANGE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What Megatron-Core's llama3 scaling is fixed to (models/common/embeddings/rotary_pos_embedding.py)."""
FULL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers that have rotary parameters of their own in some classes."""


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a configuration."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling != "none":
        parameters |= {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rotary_percent < 1:
        parameters["partial_rotary_factor"] = model.rotary_percent
    if model.rope_scaling == "yarn" and not model.yarn_correction_range_round_to_int:
        parameters["truncate"] = False
    if model.rope_scaling in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = model.rope_original_max_position_embeddings
    return parameters | (LLAMA3_RANGE if model.rope_scaling == "llama3" else {})


def rope_by_kind(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of classes that have them for each kind of layer."""
    everywhere = rope_parameters(model)
    local = everywhere
    if model.rotary_base_local is not None:
        local = {"rope_type": "default", "rope_theta": float(model.rotary_base_local)}
    return {"rope_parameters": {FULL: everywhere, LOCAL: local}}


def one_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields with the rotary parameters of the layers that see everything.

    Those of the others are in `rotary_base_local`, None where all layers rotate alike, or all have no window.

    Raises:
        ConversionError: layers within the window have another scaling.
    """
    full, local = (fields["rope_parameters"][kind] for kind in (FULL, LOCAL))
    base = None
    if LOCAL in fields["layer_types"] and full != local:
        if local.get("rope_type") != "default" or {*local} - {"rope_type", "rope_theta"}:
            raise ConversionError(
                f"config.json: rope_parameters of {LOCAL} {local} are not those of {FULL} {full}, but for more than a "
                "base; import a model without"
            )
        base = _whole(local["rope_theta"])
    return {**fields, "rope_parameters": full, "rotary_base_local": base}


def rope_keys(parameters: Mapping[str, Any], *, has_partial: bool) -> dict[str, Any]:
    """Our keys from `rope_parameters`; `rope_parameters` of the result says whether they express all of it.

    Args:
        parameters: of a configuration.
        has_partial: whether its class rotates only a share of the channels if told so.

    Raises:
        ConversionError: a kind of scaling, or a base, that ours has not.
    """
    kind, base = parameters["rope_type"], parameters["rope_theta"]
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConversionError(
            f"config.json: rope_type {kind!r} has no counterpart; only default, linear, llama3 and yarn import"
        )
    keys: dict[str, Any] = {"rotary_base": _whole(base)}
    if kind != "default":
        keys |= {"rope_scaling": kind, "rope_scaling_factor": float(parameters["factor"])}
    if kind == "yarn":
        keys["yarn_correction_range_round_to_int"] = bool(parameters.get("truncate", True))
    if has_partial:
        keys["rotary_percent"] = float(parameters.get("partial_rotary_factor", 1.0))
    if "original_max_position_embeddings" in parameters:
        keys["rope_original_max_position_embeddings"] = int(parameters["original_max_position_embeddings"])
    return keys


def _whole(base: float) -> int:
    if base != int(base):
        raise ConversionError(f"config.json: rope_theta {base} is not a whole number, as model.rotary_base must be")
    return int(base)
