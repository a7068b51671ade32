"""Megatron-Core's formulas without torch.compile, whoever imported it first.

Its `jit_fuser` (jit.py:21) wraps some forty functions in torch.compile, which needs a C++ compiler at the first call; a
laptop may have none. `no_compilation` prevents that while this package imports Megatron-Core, and spares every process
the 1.5 s in which torch imports its compiler; what a caller had imported before is unwrapped by `redirections`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch

from sparsecod_megatron.backend.redirection import Redirection

ATTRIBUTE_OF_ORIGINAL = "_torchdynamo_orig_callable"
"""Where a function that torch.compile returned has the one that it was given."""


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """While Megatron-Core is imported here, its `jit_fuser` leaves functions as they are."""
    original = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def compiled_functions() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, original) of Megatron-Core's compiled functions, under each name by which they can be reached."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(("megatron.core.", "sparsecod_megatron.")):
            continue
        classes = [
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module_name
        ]
        for owner in (module, *classes):
            for name, value in vars(owner).items():
                original = getattr(value, ATTRIBUTE_OF_ORIGINAL, None) if isinstance(value, FunctionType) else None
                # The graphs that torch has compiled stand in modules too; they come from functions of no module.
                if isinstance(original, FunctionType) and str(original.__module__).startswith("megatron.core."):
                    yield owner, name, original


def redirections() -> list[Redirection]:
    """Redirections of what was imported compiled, nothing where this package came first, and of later imports."""
    from megatron.core import jit

    later = Redirection(jit, "jit_fuser", jit.noop_decorator, "jit.py:21", "modules imported later compile too")
    return [later] + [
        Redirection(owner, name, original, "jit.py:21", "compiles at its first call")
        for owner, name, original in compiled_functions()
    ]
