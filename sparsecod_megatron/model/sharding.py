"""Says of every parameter whether tensor-parallel ranks hold different parts of it, as Megatron-Core asks for it.

The gradient norm, and with it clipping, counts a parameter without `tensor_model_parallel` on the first tensor-parallel
rank alone, and Muon takes a shard without `partition_dim` for a whole matrix. Megatron's own linear layers set these
attributes; under Transformer Engine the experts' lack them (extensions/transformer_engine.py:611-619, 1521-1529: the
layer is told that it is not sharded). So they are set here, whatever the backend did.

Source: Megatron-Core 0.16.1 tensor_parallel/layers.py, optimizer/optimizer.py, optimizer/muon.py.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from sparsecod_megatron.model.init import SHARDED_DIMENSION, matrix_kind


def mark_sharded(chunk: GPTModel, *, gated: bool) -> None:
    """Set `tensor_model_parallel`, `partition_dim` and `partition_stride` of every parameter. Local.

    An expert's matrices count as sharded whatever the experts' tensor-parallel size: no two tensor-parallel ranks own
    the same part of them.

    Args:
        chunk: as built, without wrappers; before an optimizer copies the attributes.
        gated: whether an MLP's first matrix is gate over up.
    """
    for name, parameter in chunk.named_parameters():
        kind = matrix_kind(name)
        dimension = -1 if kind is None else SHARDED_DIMENSION.get(kind, -1)
        parameter.tensor_model_parallel = dimension >= 0
        parameter.partition_dim = dimension
        parameter.partition_stride = 2 if kind == "mlp_input" and gated else 1
