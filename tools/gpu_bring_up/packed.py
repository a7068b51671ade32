"""What the packed folder says of itself: `packed.json`, written by `pack.py`, read by the steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PACK_FILE, TOKENS, RUN = "packed.json", "tokens", "cpu_run"


@dataclass(frozen=True)
class Packed:
    """Tokens and a checkpoint made on a CPU.

    Attributes:
        prefix: of the token files.
        run_dir: run directory with the checkpoint.
        overrides: of nano_dense.yaml that it was trained with.
        steps: that it was trained for.
    """

    prefix: Path
    run_dir: Path
    overrides: tuple[str, ...]
    steps: int


def write_packed(folder: Path, *, overrides: tuple[str, ...], steps: int) -> None:
    """The last file of a packed folder."""
    (folder / PACK_FILE).write_text(json.dumps({"overrides": overrides, "steps": steps}, indent=2) + "\n")


def read_packed(folder: Path) -> Packed:
    """What `write_packed` wrote, with paths of where the folder lies now."""
    values = json.loads((folder / PACK_FILE).read_text())
    return Packed(folder / TOKENS, folder / RUN, tuple(values["overrides"]), values["steps"])
