"""What a run can have beside Megatron-Core's own transformer and step: one file each, and one line in the registry."""

from sparsecod_megatron.mechanisms.registry import MECHANISMS, SAVED_MECHANISMS

__all__ = ["MECHANISMS", "SAVED_MECHANISMS"]
