"""Megatron-Core's places of parameters in the optimizer's gathered state, which forget the padding of buckets.

`get_parameter_state_dp_zero` joins the buckets without the padding at their ends; the caller then cuts parameters out
by `param_index_map`, which counts it. From the second bucket on, every parameter is given its neighbours' numbers.

Source: megatron-core 0.16.1 optimizer/distrib_optimizer.py:1479-1508; fixed upstream after 0.19.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_Places = dict[object, tuple[int, int, int]]
"""By parameter: first element, element after the last, bucket."""


@contextmanager
def places_without_padding(part: DistributedOptimizer) -> Iterator[None]:
    """While the block runs, parameters are where the gathered state has them. Local.

    Args:
        part: nothing but its `sharded_state_dict` may be called in the block.
    """
    counted = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        buffer.param_index_map = _without_padding(buffer)
    try:
        yield
    finally:
        for buffer, places in zip(part.buffers, counted, strict=True):
            buffer.param_index_map = places


def _without_padding(buffer: _ParamAndGradBuffer) -> _Places:
    padding, before = [], 0
    for bucket in buffer.buckets:
        padding.append(before)
        before += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
