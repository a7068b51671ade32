"""Prepares one rank for CUDA: its device, the order of launches that overlap relies on, and Transformer Engine."""

from __future__ import annotations

import importlib.util
import os

import torch

from sparsecod_megatron.errors import ConfigError


def prepare(local_rank: int) -> torch.device:
    """Bind this process to its GPU.

    Args:
        local_rank: index of this process on its node.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: more ranks than GPUs on the node, or no Transformer Engine.
    """
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK: {local_rank}, but this node shows {torch.cuda.device_count()} GPUs; start at most one "
            f"process per GPU"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "backend: 'cuda' needs Transformer Engine, which is not installed; use an NGC PyTorch container or "
            'pip install "sparsecod_megatron[gpu]"'
        )
    # Megatron's overlap of communication with matrix products counts on kernels running in the order they were
    # launched.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def versions(device: torch.device) -> tuple[tuple[int, int], tuple[int, int]]:
    """(compute capability of the device, CUDA version that PyTorch was built with)."""
    assert torch.version.cuda is not None, "a CUDA device is visible only to a PyTorch built with CUDA"
    major, minor = torch.version.cuda.split(".")[:2]
    return torch.cuda.get_device_capability(device), (int(major), int(minor))
