"""A table of parameters whose rows are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenTable(torch.nn.Module):
    """Rows that are looked up, with their columns spread over tensor-parallel ranks: a look-up needs no other rank.

    Args:
        config: Megatron-Core's configuration of the model.
        rows: of the table.
        columns: of the whole table.
        tp_group: ranks that share the columns.
    """

    def __init__(self, config: Any, rows: int, columns: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        shape = rows, columns // tp_group.size()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))

    def forward(self, rows: Tensor) -> Tensor:
        """[...] → [..., columns/TP]."""
        return torch.nn.functional.embedding(rows, self.weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Cut by columns."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state
