"""NVIDIA ModelOpt made usable: looked for, imported in the right order, kept from printing, and asked what it left."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.compression.changes import Changes, eligible
from sparsecod_megatron.compression.experts import is_fused
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms.weights.engine.patterns import exceeding_groups


def require_modelopt() -> None:
    """Refuse to continue without ModelOpt; cheap, because it imports nothing.

    Raises:
        ConfigError: ModelOpt is not installed.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise ConfigError("needs NVIDIA ModelOpt, which is not installed: pip install 'sparsecod_megatron[modelopt]'")


def modelopt_version() -> str:
    """Version of the installed package."""
    return metadata.version("nvidia-modelopt")


@contextlib.contextmanager
def quiet_modelopt() -> Iterator[None]:
    """Import and call ModelOpt inside: it prints each layer to stdout, and warns of what our report lists.

    ModelOpt imports Megatron-Core where that is installed, so the backend is chosen before.
    """
    select_backend()
    loggers = [logging.getLogger(name) for name in ("modelopt", "transformers")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def put_sparse(changes: Changes, converted: PreTrainedModel) -> None:
    """Take over the matrices that ModelOpt has made 2:4, and leave the others."""
    for name, weight in eligible(converted):
        if weight.shape[-1] % 4 == 0 and not exceeding_groups(weight, 2, 4):
            changes.put(name, weight)


def why_passed_over(module: nn.Module, weight: Tensor, *, rows: int = 1, columns: int = 1) -> str:
    """Why ModelOpt has left a matrix as it was.

    Args:
        module: that holds it.
        weight: `[..., out, in]`.
        rows: of what ModelOpt needs the number of rows to be a multiple.
        columns: likewise.
    """
    taken = isinstance(module, nn.Linear) or is_fused(module)
    if taken and (weight.shape[-2] % rows or weight.shape[-1] % columns):
        return f"rows and columns must be multiples of {rows} and {columns}"
    return "ModelOpt skips routers, gates of experts and layers that are not linear"


def warnings_about(unreached: Sequence[str]) -> list[str]:
    """What to say of layers that calibration did not reach."""
    if not unreached:
        return []
    return [f"no calibration token reached {len(unreached)} layers, the first {unreached[0]}; more --samples would"]
