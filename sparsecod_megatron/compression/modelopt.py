"""NVIDIA ModelOpt made usable: looked for, imported in the right order, kept from printing, and asked what it left."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.errors import ConfigError


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


def warnings_about(unreached: Sequence[str]) -> list[str]:
    """What to say of layers that calibration did not reach."""
    if not unreached:
        return []
    return [f"no calibration token reached {len(unreached)} layers, the first {unreached[0]}; more --samples would"]
