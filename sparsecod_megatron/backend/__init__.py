"""Where a run computes: CUDA with NCCL and Transformer Engine, or CPU with gloo and reference modules."""

from sparsecod_megatron.backend.select import Backend, select_backend

__all__ = ["Backend", "select_backend"]
