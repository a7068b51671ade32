"""What mechanisms make of a layer of the `sparsecod` architecture, by name.

Here the table is filled by whoever knows the mechanisms; an export has a file of this name that lists the code beside
it. So a model whose mechanism is unknown is refused, never computed without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Extension = Callable[[Any, dict[str, Any], Any, int], None]
"""Changes a layer that is built; called with it, the mechanism's settings, the configuration and the layer's index."""

EXTENSIONS: dict[str, Extension] = {}
FORMER_FIELDS: dict[tuple[str, str], str] = {}
"""(field of the configuration, value) of earlier exports → the mechanism that it has become."""
