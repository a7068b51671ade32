"""One replaced attribute, with the reason kept beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("sparsecod")


@dataclass(frozen=True)
class Redirection:
    """Replace `getattr(owner, name)`.

    Attributes:
        owner: a module or class of torch or Megatron-Core.
        name: the attribute.
        replacement: its new value.
        upstream: the Megatron-Core 0.16.1 places (under megatron/core) that need it.
        reason: why the original cannot serve on CPU.
        absent: Megatron-Core defines the name only where a CUDA package is installed, and uses it regardless.
        speed_only: the original serves too, slower: if upstream drops the name, a run goes without.
    """

    owner: Any
    name: str
    replacement: Any
    upstream: str
    reason: str
    absent: bool = False
    speed_only: bool = False

    def apply(self) -> bool:
        """Replace the attribute; a misspelt name is an error, not a new attribute.

        Returns:
            False where a name that only gains speed is not there, which is logged.
        """
        if not self.absent and not hasattr(self.owner, self.name):
            changed = f"{self.owner} has no {self.name}: Megatron-Core or torch changed"
            assert self.speed_only, changed
            logger.warning("%s; continuing without what it gained (%s)", changed, self.reason)
            return False
        setattr(self.owner, self.name, self.replacement)
        return True
