"""Checkpoints that any layout writes and any layout reads, through Megatron-Core's dist_checkpointing."""

from sparsecod_megatron.checkpoint.native import load_checkpoint, load_latest, load_weights
from sparsecod_megatron.checkpoint.paths import resolve_step_dir, resume_candidates, step_dir_name
from sparsecod_megatron.checkpoint.saver import CheckpointSaver, save_checkpoint
from sparsecod_megatron.checkpoint.state import TrainState

__all__ = [
    "CheckpointSaver",
    "TrainState",
    "load_checkpoint",
    "load_latest",
    "load_weights",
    "resolve_step_dir",
    "resume_candidates",
    "save_checkpoint",
    "step_dir_name",
]
