"""Process groups, passed as arguments, the one reduction that every metric goes through, and processes that share work.

What is offered here is looked up when it is used: groups need Megatron-Core, whose import takes seconds and a chosen
backend, and whoever only imports `processes` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecod_megatron.parallel.groups import ProcessGroups, process_groups, running_processes, world
    from sparsecod_megatron.parallel.reduce import all_reduce_sums, any_rank, reduced, wait_for_all

_HOME = dict.fromkeys(("all_reduce_sums", "any_rank", "reduced", "wait_for_all"), "reduce")
__all__ = [
    "ProcessGroups",
    "all_reduce_sums",
    "any_rank",
    "process_groups",
    "reduced",
    "running_processes",
    "wait_for_all",
    "world",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'groups')}"), name)
