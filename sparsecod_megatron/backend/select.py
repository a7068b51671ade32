"""Chooses the backend once, before Megatron-Core is imported, and says what depends on it.

The CPU folder is imported only when CPU is chosen, so nothing of it can reach a GPU run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sparsecod_megatron.backend.precision_support import check_precision
from sparsecod_megatron.config import PrecisionConfig
from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """What differs between the two ways to compute.

    Attributes:
        name: `cpu` or `cuda`, the values of the configuration key.
        communication: torch.distributed backend.
        device: device of this rank's parameters.
        transformer_engine: whether layers are Transformer Engine's or the reference ones.
    """

    name: str
    communication: str
    device: torch.device
    transformer_engine: bool


def select_backend(
    requested: str = "auto", *, precision: PrecisionConfig | None = None, cpu_kernels: str | None = None
) -> Backend:
    """Choose and prepare the backend of this process. Local; call before importing Megatron-Core's model code.

    Args:
        requested: `auto` (CUDA if there is any), `cpu` or `cuda`.
        precision: what a run will train in; None where weights are only read.
        cpu_kernels: the configuration's; None leaves those in use. CUDA has no choice of them.

    Raises:
        ConfigError: `cuda` without CUDA, `cpu` where CUDA is visible, a precision that the device does not have, FP8
            without Transformer Engine, or an environment variable that holds no choice of products.
    """
    # Before the driver is asked anything, because it reads this once. Megatron's overlap of communication with matrix
    # products counts on kernels running in the order they were launched.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError(
            "backend: 'cuda' but this process sees no CUDA device; use backend=cpu or a machine with a GPU"
        )
    if requested == "cpu" and available:
        raise ConfigError(
            "backend: 'cpu' but CUDA is visible; hide it with CUDA_VISIBLE_DEVICES='' or use backend=cuda"
        )
    if precision is not None and not available:
        check_precision(precision, capability=None)
    return _cuda(precision) if available else _cpu(cpu_kernels)


def _cuda(precision: PrecisionConfig | None) -> Backend:
    from sparsecod_megatron.backend.cuda import prepare, prepare_modules, versions

    device = prepare(local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if precision is not None:
        capability, cuda_version = versions(device)
        check_precision(precision, capability=capability, cuda_version=cuda_version)
    engine = prepare_modules(needs_fp8=precision is not None and precision.fp8)
    return Backend(name="cuda", communication="nccl", device=device, transformer_engine=engine)


def _cpu(kernels: str | None) -> Backend:
    from sparsecod_megatron.backend import choice
    from sparsecod_megatron.backend.cpu import apply_redirections

    choice.requested()  # an invalid value is refused now, by every rank

    apply_redirections(kernels)
    return Backend(name="cpu", communication="gloo", device=torch.device("cpu"), transformer_engine=False)
