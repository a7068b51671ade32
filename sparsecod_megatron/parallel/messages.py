"""What pipeline stages send each other where the residual state is wider than the model, or in another type.

Megatron-Core derives the shape of a message from `hidden_size`, and its interleaved schedule takes no other; the
communicator that both schedules are given replaces the last dimension, so that no shape has to be exchanged.
Source: Megatron-Core 0.16.1 pipeline_parallel/schedules.py:1019, 1946; p2p_communication.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class StateCommunicator(P2PCommunicator):
    """Messages [S_local, B, columns · H].

    Args:
        pp_group: pipeline stages of this rank.
        config: of the model.
        columns: vectors of H numbers of a token.
        dtype: of the state; None: the model's.
    """

    def __init__(
        self, pp_group: torch.distributed.ProcessGroup, config: Any, columns: int, dtype: torch.dtype | None
    ) -> None:
        own = copy.copy(config)
        own.pipeline_dtype = dtype or config.pipeline_dtype
        super().__init__(pp_group, own)
        self._columns = columns

    def _communicate(self, *, tensor_shape: Any, **arguments: Any) -> Any:
        """The parent's, with the state's width; no shape where nothing is received."""
        if tensor_shape is not None:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * self._columns)
        return super()._communicate(tensor_shape=tensor_shape, **arguments)
