"""A checkpoint as a HuggingFace directory: what evaluation, analysis and studies read."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
from sparsecod_megatron.hf import export_model


def export_checkpoint(path: Path, output: Path) -> Path:
    """Write a checkpoint's weights in fp32, with its tokenizer. Local; needs a selected backend.

    Args:
        path: a run directory or one of its step directories.
        output: the directory, which must not be there yet.

    Returns:
        `output`.

    Raises:
        CheckpointError: no checkpoint there, or not as it was written.
        ConversionError: a model that HuggingFace cannot express.
    """
    with streamed_checkpoint(path) as source:
        return export_model(
            source.config.model,
            source.tensors,
            output,
            seq_length=source.config.data.seq_length,
            dtype=torch.float32,
            tokenizer_dir=source.tokenizer_dir,
        )
