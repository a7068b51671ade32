"""NVIDIA's packages that Megatron-Core takes wherever they can be imported, also where nothing of them can run.

An NGC image on a machine without a GPU has Transformer Engine and apex: their optimizer, norms and scaling import
there, and would be called with tensors of the CPU. Transformer Engine without its compiled parts even ends
`import megatron.core`, which expects an ImportError alone (utils.py:80). A hidden package looks as if not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

from sparsecod_megatron.errors import ConfigError

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
"""The package and its compiled part."""
APEX = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")
"""The package and those of its extensions that Megatron-Core imports by themselves."""
EXPERIMENT_TRACKER = "wandb"
"""Megatron-Core imports it, a fifth of a rank's start, for records of an inference engine that nothing here uses."""


def hide(packages: Iterable[str]) -> None:
    """Make every later import of these raise ModuleNotFoundError in this process. Local.

    Args:
        packages: top-level names.

    Raises:
        ConfigError: Megatron-Core was imported before and has taken one of them.
    """
    hidden = set(packages)
    modules: dict[str, ModuleType | None] = dict(sys.modules)
    loaded = [name for name, module in modules.items() if module is not None and name.split(".")[0] in hidden]
    if loaded and "megatron.core" in sys.modules:
        raise ConfigError(
            f"Megatron-Core was imported before the backend was chosen and has taken {loaded[0].split('.')[0]}, which "
            "this run has no device for; call select_backend() before importing megatron.core"
        )
    sys.modules.update(dict.fromkeys([*hidden, *loaded], None))  # type: ignore[arg-type]  # None is how Python says it


@contextlib.contextmanager
def hidden_package(package: str) -> Iterator[None]:
    """While the block runs, no import finds a package that was not imported before. Local.

    Args:
        package: a top-level name.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # as in `hide`
    try:
        yield
    finally:
        del sys.modules[package]


def why_no_transformer_engine() -> str | None:
    """Why Transformer Engine cannot be used in this process, in a few words; None if it can be. Local.

    Imports it, because a build for another PyTorch or CUDA is found, but ends while it loads.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # any exception: what is missing decides where loading fails
        return f"it cannot be imported ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
    return None
