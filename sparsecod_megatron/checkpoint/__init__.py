"""Checkpoints that any layout writes and any layout reads, through Megatron-Core's dist_checkpointing."""

from sparsecod_megatron.checkpoint.native import load_checkpoint, load_weights, save_checkpoint
from sparsecod_megatron.checkpoint.paths import latest_step_dir, resolve_step_dir, step_dir_name
from sparsecod_megatron.checkpoint.state import TrainState

__all__ = [
    "TrainState",
    "latest_step_dir",
    "load_checkpoint",
    "load_weights",
    "resolve_step_dir",
    "save_checkpoint",
    "step_dir_name",
]
