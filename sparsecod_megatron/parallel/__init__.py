"""Process groups, passed as arguments, and the one reduction that every metric goes through."""

from sparsecod_megatron.parallel.groups import ProcessGroups, process_groups, running_processes, world
from sparsecod_megatron.parallel.reduce import all_reduce_sums, any_rank

__all__ = [
    "ProcessGroups",
    "all_reduce_sums",
    "any_rank",
    "process_groups",
    "running_processes",
    "world",
]
