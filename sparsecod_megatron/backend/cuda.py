"""Prepares one rank for CUDA: its device, and where modules come from.

A machine without Transformer Engine trains with the reference modules of the CPU backend, on CUDA and NCCL.
"""

from __future__ import annotations

import logging

import torch

from sparsecod_megatron.backend.packages import (
    EXPERIMENT_TRACKER,
    TRANSFORMER_ENGINE,
    hidden_package,
    hide,
    why_no_transformer_engine,
)
from sparsecod_megatron.backend.redirection import Redirection
from sparsecod_megatron.errors import ConfigError

logger = logging.getLogger("sparsecod")

_applied: list[Redirection] = []


def prepare(local_rank: int) -> torch.device:
    """Bind this process to its GPU.

    Args:
        local_rank: index of this process on its node.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: more ranks than GPUs on the node.
    """
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK: {local_rank}, but this node has {torch.cuda.device_count()} GPUs; start at most one "
            f"process per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def versions(device: torch.device) -> tuple[tuple[int, int], tuple[int, int]]:
    """(compute capability of the device, CUDA version that PyTorch was built with)."""
    assert torch.version.cuda is not None, "a CUDA device is visible only to a PyTorch built with CUDA"
    major, minor = torch.version.cuda.split(".")[:2]
    return torch.cuda.get_device_capability(device), (int(major), int(minor))


def prepare_modules(*, needs_fp8: bool) -> bool:
    """Decide where Megatron-Core's modules come from, once in a process and before it is imported. Local.

    Args:
        needs_fp8: whether the run multiplies in FP8, which only Transformer Engine does.

    Returns:
        Whether layers are Transformer Engine's; otherwise one line of warning says why not.

    Raises:
        ConfigError: FP8 without Transformer Engine, or Megatron-Core was imported before and holds a broken one.
    """
    absent = why_no_transformer_engine()
    if absent and needs_fp8:
        raise ConfigError(
            f"precision.fp8_recipe: FP8 needs Transformer Engine, but {absent}; use an NGC PyTorch container, "
            'pip install "sparsecod_megatron[gpu]", or precision.fp8_recipe=none'
        )
    if _applied:
        return absent is None
    if absent:
        hide(TRANSFORMER_ENGINE)
        logger.warning(
            "training without Transformer Engine (%s): the same model from PyTorch's modules, slower and in more "
            'memory; an NGC PyTorch container or pip install "sparsecod_megatron[gpu]" brings it',
            absent,
        )
    with hidden_package(EXPERIMENT_TRACKER):
        from sparsecod_megatron.backend import stand_ins

    _applied.extend(each for each in stand_ins.redirections() if each.apply())
    return absent is None
