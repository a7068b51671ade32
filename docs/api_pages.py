"""Makes the API reference when mkdocs builds the site: a page a package folder, with every public module in it.

A hook of mkdocs.yml. The pages follow from the code, so none can be forgotten or outlive its module.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGE = "sparsecod_megatron"
ROOT = Path(__file__).resolve().parents[1]


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in sorted(folders())]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to the site."""
    for name, modules in folders().items():
        files.append(File.generated(config, f"api/{name}.md", content=page(name, modules)))
    return files


def folders() -> dict[str, list[str]]:
    """Folders of the package by name, each with its public modules, dotted and below the package."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        if any(part.startswith("_") for part in parts) or not has_public_names(path):
            continue
        folder = parts[0] if len(parts) > 1 else "errors"
        found.setdefault(folder, []).append(".".join(parts))
    return found


def has_public_names(path: Path) -> bool:
    """Whether a module defines anything that its reader may use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = (ast.Assign, ast.AnnAssign)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)] if isinstance(node, assigned) else []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        if any(not name.startswith("_") for name in names):
            return True
    return False


def page(name: str, modules: list[str]) -> str:
    """One folder's page: what the folder is for, then its modules."""
    package = ROOT / PACKAGE / name / "__init__.py"
    summary = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) if package.exists() else None
    blocks = [f"::: {PACKAGE}.{module}" for module in modules]
    return "\n\n".join([f"# `{name}`", *([summary] if summary else []), *blocks]) + "\n"
