"""Says of every parameter whether tensor-parallel ranks hold different parts of it, as Megatron-Core asks for it.

The gradient norm, and with it clipping, counts a parameter without `tensor_model_parallel` on the first tensor-parallel
rank alone, and Muon takes a shard without `partition_dim` for a whole matrix. Megatron's own linear layers set these
attributes; under Transformer Engine the experts' lack them (extensions/transformer_engine.py:611-619, 1521-1529: the
layer is told that it is not sharded). So they are set here, whatever the backend did.

Source: Megatron-Core 0.16.1 tensor_parallel/layers.py, optimizer/optimizer.py, optimizer/muon.py.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config.parameters import ParameterTable


def mark_sharded(chunk: GPTModel, table: ParameterTable, groups: ProcessGroupCollection) -> None:
    """Set `tensor_model_parallel`, `partition_dim` and `partition_stride` of every parameter. Local.

    An expert's matrices count as sharded whatever the experts' tensor-parallel size: no two tensor-parallel ranks own
    the same part of them. What all ranks of an expert hold whole does only where that size is 1.

    Args:
        chunk: as built, without wrappers; before an optimizer copies the attributes.
        table: of the model's parameters.
        groups: the run's process groups.
    """
    experts_are_whole = groups.expt_tp.size() == 1
    for name, parameter in chunk.named_parameters():
        kind = table.find(name)
        parameter.tensor_model_parallel = kind.dimension is not None or (kind.split == "expert" and experts_are_whole)
        parameter.partition_dim = -1 if kind.dimension is None else kind.dimension
        parameter.partition_stride = kind.stacked
        if kind.split == "expert" and kind.group == "biases":
            # Upstream's mark would sum gradients over ranks that hold other experts (tensor_parallel/layers.py:1228).
            parameter.sequence_parallel = False
