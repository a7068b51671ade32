"""One replaced attribute, with the reason kept beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    """

    owner: Any
    name: str
    replacement: Any
    upstream: str
    reason: str
    absent: bool = False

    def apply(self) -> Redirection:
        """Replace the attribute; a misspelt name is an error, not a new attribute."""
        assert self.absent or hasattr(self.owner, self.name), (
            f"{self.owner} has no {self.name}: Megatron-Core or torch changed"
        )
        setattr(self.owner, self.name, self.replacement)
        return self
