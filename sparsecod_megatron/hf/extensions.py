"""The code of mechanisms beside an export's weights, and the file that lists it for `modeling_sparsecod.py`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from sparsecod_megatron.seams.mechanism import Module

LISTING = "extensions_sparsecod.py"
"""Stands in place of the package's file of that name."""


def copy_extensions(modules: Mapping[str, Module], folder: Path) -> None:
    """Write the mechanisms' files and the list of them.

    Args:
        modules: what `choose.exported_modules` gave.
        folder: of the model.
    """
    lines = ['"""The mechanisms of this model."""', ""]
    for name, module in modules.items():
        for file in (module.code, *module.beside):
            shutil.copyfile(file, folder / file.name)
        lines.append(f"from .{module.code.stem} import extend as {name}")
    entries = ", ".join(f'"{name}": {name}' for name in modules)
    lines += ["", f"EXTENSIONS = {{{entries}}}", "FORMER_FIELDS = {}", ""]
    (folder / LISTING).write_text("\n".join(lines), encoding="utf-8")
