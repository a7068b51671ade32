"""What the ranks of a worker find, written where the test that started them reads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsecod_megatron.backend import Backend


@contextlib.contextmanager
def found_by_ranks(backend: Backend, output: Path | str) -> Iterator[dict[str, Any]]:
    """The processes connected while the block runs, and what they find, which rank 0 writes as JSON at its end.

    Args:
        backend: says how they communicate.
        output: the file to write.
    """
    from sparsecod_megatron.parallel import world

    found: dict[str, Any] = {}
    with world(communication=backend.communication):
        yield found
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(found))
