"""What Transformer Engine keeps beside weights, a module's `_extra_state`: in checkpoints of `delayed` scaling alone.

There it is the scales and the maxima that they come from, without which a resumed run multiplies differently. Under
every other recipe, in bf16 and on the CPU nothing reads it, while each backend has it at other modules: a checkpoint
that held it would load on the backend that wrote it alone.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.metadata import Metadata

from sparsecod_megatron.checkpoint.untrusted import read_pickle

logger = logging.getLogger("sparsecod")

_CLASSES_ALLOWED = {
    "collections": {"OrderedDict"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    "transformer_engine.common.recipe": {"Format", "_FormatHelper"},
}
"""What the pickle of a module's scales names. `_load_from_bytes` is a torch.load, which `tensors_only` restrains."""


def is_extra_state(key: str) -> bool:
    """Whether a key of a module's state is Transformer Engine's, of one product or of one among several."""
    return "_extra_state" in key.rpartition(".")[2]


def model_state_to_keep(model: GPTModel, state: ShardedStateDict) -> ShardedStateDict:
    """A model's sharded state as checkpoints hold it: with scales where its recipe has any to remember. Local."""
    if model.config.fp8 and model.config.fp8_recipe == "delayed":
        return state
    return {key: leaf for key, leaf in state.items() if not is_extra_state(key)}


def without_absent_scales(state: ShardedStateDict, stored: Metadata) -> ShardedStateDict:
    """What can be asked of a checkpoint that another precision or backend wrote: no scales that it lacks. Local.

    Args:
        state: this rank's, its models by chunk.
        stored: the list of what the checkpoint holds.
    """
    absent = 0
    kept: dict[str, Any] = {}
    for name, part in state.items():
        if not name.startswith("model"):
            kept[name] = part
            continue
        kept[name] = {key: leaf for key, leaf in part.items() if not _is_absent(leaf, stored)}
        absent += len(part) - len(kept[name])
    if absent:
        logger.info("the checkpoint holds no FP8 scales for %d modules of this rank; theirs start afresh", absent)
    return kept


def _is_absent(leaf: Any, stored: Metadata) -> bool:
    return isinstance(leaf, ShardedObject) and leaf.unique_key not in stored.state_dict_metadata


def check_scales(loaded: Mapping[str, Any]) -> None:
    """Read every module's scales as Transformer Engine will, but without calling anything else. Local.

    To be called, and the scales set, inside `tensors_only`.

    Args:
        loaded: a model's state, by key.

    Raises:
        pickle.UnpicklingError: they name something else, or are damaged.
    """
    for key, value in loaded.items():
        if not is_extra_state(key) or value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
            raise pickle.UnpicklingError(f"{key} holds a {type(value).__name__} instead of bytes")
        if value.numel():
            read_pickle(value.cpu().numpy().tobytes(), _CLASSES_ALLOWED, f"{key}: FP8 scales")
