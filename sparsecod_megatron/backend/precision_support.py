"""Which GPUs multiply in the number format that a run asks for.

Transformer Engine refuses too, in the middle of the first forward pass; on the CPU nothing would, and the run would
train in bf16 under the name of FP8.
"""

from __future__ import annotations

from sparsecod_megatron.config import PrecisionConfig
from sparsecod_megatron.errors import ConfigError

_FP8_CAPABILITY = (8, 9)  # Ada
_BLOCKWISE_CAPABILITY = (9, 0)  # Hopper
_BLOCKWISE_CUDA = (12, 9)
_MXFP8_CAPABILITY, _MXFP8_BEFORE = (10, 0), (12, 0)  # the Blackwell of data centres, not the one of workstations


def check_precision(
    precision: PrecisionConfig, *, capability: tuple[int, int] | None, cuda_version: tuple[int, int] | None = None
) -> None:
    """Refuse a recipe that this device cannot run. Local, and without touching a device.

    Args:
        precision: the run's section.
        capability: compute capability of the GPU, (9, 0) for Hopper; None is the CPU backend.
        cuda_version: that PyTorch was built with; None is not checked.

    Raises:
        ConfigError: the recipe needs another device or CUDA version.

    Source: transformer_engine/pytorch/quantization.py, check_recipe_support.
    """
    if not precision.fp8:
        return
    recipe = precision.fp8_recipe
    key = f"precision.fp8_recipe: {recipe!r}"
    if capability is None:
        raise ConfigError(
            f"{key} needs a CUDA GPU with FP8 (Hopper or newer), but this run computes on the CPU; use a GPU or "
            "precision.fp8_recipe=none"
        )
    has = f"this one has {capability[0]}.{capability[1]}"
    if capability < _FP8_CAPABILITY:
        raise ConfigError(f"{key} needs a GPU of compute capability 8.9, {has}; use precision.fp8_recipe=none")
    if recipe == "mxfp8" and not _MXFP8_CAPABILITY <= capability < _MXFP8_BEFORE:
        instead = "blockwise" if capability >= _BLOCKWISE_CAPABILITY else "tensorwise"
        raise ConfigError(
            f"{key} needs a Blackwell GPU of compute capability 10.x, {has}; use precision.fp8_recipe={instead}"
        )
    if recipe == "blockwise" and capability < _BLOCKWISE_CAPABILITY:
        raise ConfigError(f"{key} needs a GPU of compute capability 9.0, {has}; use precision.fp8_recipe=tensorwise")
    if recipe == "blockwise" and cuda_version is not None and cuda_version < _BLOCKWISE_CUDA:
        seen = ".".join(map(str, cuda_version))
        raise ConfigError(
            f"{key} needs a PyTorch built with CUDA 12.9, this one has {seen}; install one or use "
            "precision.fp8_recipe=tensorwise"
        )
