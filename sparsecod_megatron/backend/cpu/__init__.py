"""What lets the unmodified Megatron-Core run without CUDA: a list of small, named redirections, applied once.

Each one replaces a single attribute of torch or Megatron-Core, and says why and for which upstream place. Nothing here
changes a result: tests/dist compares every layout against one process, tests/unit/backend each redirection against what
it stands for. The last of them, which only make a run faster (`kernels.py`), can be exchanged later.
"""

from __future__ import annotations

import torch

from sparsecod_megatron.backend.packages import APEX, EXPERIMENT_TRACKER, TRANSFORMER_ENGINE, hidden_package, hide
from sparsecod_megatron.backend.redirection import Redirection

_applied: list[Redirection] = []
_kernels: list[Redirection] = []


def apply_redirections(kernels: str | None = None) -> list[Redirection]:
    """Apply all redirections; a second call changes at most the kernels. Local.

    Args:
        kernels: `plain`, `fast` or `compiled`; None leaves those in use, at first the default ones.

    Returns:
        What was applied, in order.

    Raises:
        AssertionError: CUDA is present; `select_backend` never comes here then.
        ConfigError: Megatron-Core was imported before, with packages that run on CUDA alone.
    """
    assert not torch.cuda.is_available(), "the CPU redirections must not touch a process that has CUDA"
    from sparsecod_megatron.backend.cpu import eager, torch_cuda

    if not _applied:
        hide((*TRANSFORMER_ENGINE, *APEX))
        # torch first: Megatron-Core reads devices and streams while it is imported.
        _applied.extend(each for each in torch_cuda.redirections() if each.apply())
        with eager.no_compilation(), hidden_package(EXPERIMENT_TRACKER):
            from sparsecod_megatron.backend import stand_ins
            from sparsecod_megatron.backend.cpu import collectives, gloo_device, megatron, optimizer, results, speed

        modules = [eager, stand_ins, megatron, collectives, gloo_device, optimizer, results, speed]
        for module in modules:
            _applied.extend(each for each in module.redirections() if each.apply())
    from sparsecod_megatron.backend.cpu import kernels as sets

    if kernels is not None or not _kernels:
        _kernels[:] = [each for each in sets.redirections(kernels or sets.DEFAULT) if each.apply()]
    return [*_applied, *_kernels]
