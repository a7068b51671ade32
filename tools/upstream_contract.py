"""Lists what the package takes from Megatron-Core, torch, transformers and ModelOpt, and says what an upgrade breaks.

    python3 tools/upstream_contract.py            compare with tools/upstream_contract.txt; exit 1 with what differs
    python3 tools/upstream_contract.py --write    rewrite the list, after every difference has been looked at

Read from the source: names that are imported and attributes of them, with the parameters that each takes; methods that
subclasses override; what the CPU backend replaces; private attributes of their objects. Not torch's public names. Where
CUDA's packages are absent, what only they bring is listed as missing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = Path(__file__).with_suffix(".txt")
UPSTREAM = ("megatron", "torch", "transformers", "modelopt")
PATHS_SEARCHED = (
    "megatron/core",
    "torch/nn/modules",
    "torch/optim",
    "transformers/*.py",
    "transformers/integrations",
    "modelopt/torch/sparsity",
)
"""Where the private attributes of objects are looked for."""


class Uses(ast.NodeVisitor):
    """What one file takes from upstream."""

    def __init__(self, tree: ast.Module) -> None:
        self.imported: dict[str, str] = {}
        self.others: set[str] = set()
        self.names: set[str] = set()
        self.private: set[str] = set()
        self.defined: set[str] = set()
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:  # noqa: N802 - the names that ast calls
        """`import a.b` and `import a.b as c`."""
        for alias in node.names:
            if alias.name.partition(".")[0] in UPSTREAM:
                root = alias.name.partition(".")[0]
                self.imported[alias.asname or root] = alias.name if alias.asname else root
            else:
                self.others.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # noqa: N802
        """`from a.b import c as d`."""
        if not node.level and node.module and node.module.partition(".")[0] in UPSTREAM:
            for alias in node.names:
                self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self.names.add(f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802
        """Methods that may override one of an upstream base."""
        for base in filter(None, map(self._dotted, node.bases)):
            self.names |= {f"{base}.{each.name}?" for each in node.body if isinstance(each, ast.FunctionDef)}
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        """Names of our own."""
        self.defined.add(node.name)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # noqa: N802
        """Fields of our own dataclasses."""
        if isinstance(node.target, ast.Name):
            self.defined.add(node.target.id)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        """`module.name`, or an attribute of an object."""
        if name := self._dotted(node):
            self.names.add(name)
        elif isinstance(node.ctx, ast.Store):
            self.defined.add(node.attr)
        elif re.match(r"_[a-z]", node.attr) and not (isinstance(node.value, ast.Name) and node.value.id in self.others):
            self.private.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        """`Redirection(owner, "name", …)`."""
        self._replaced(node.args)
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:  # noqa: N802
        """A row of a table of redirections."""
        self._replaced(node.elts)
        self.generic_visit(node)

    def _replaced(self, items: list[ast.expr]) -> None:
        if len(items) > 2 and isinstance(items[1], ast.Constant) and isinstance(items[1].value, str):
            owner = self._dotted(items[0])
            if owner and items[1].value.isidentifier():
                self.names.add(f"{owner}.{items[1].value}")

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self._dotted(node.value)):
            return f"{base}.{node.attr}"
        return None


def resolve(name: str) -> Any:
    """The object of a dotted name.

    Raises:
        LookupError: there is no such name, with the first part that is missing.
    """
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], start=2):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:  # lazy packages do not show every module as an attribute, imported or not
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            raise LookupError(".".join(parts[:count])) from None
    return found


def parameters(thing: Any) -> str:
    """What it takes when it is called, without types: `(a, b=1, *, c)`."""
    if not callable(thing):
        return ""
    try:
        signature = inspect.signature(thing)
    except (ValueError, TypeError):
        return "(…)"
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def contract() -> Iterator[str]:
    """The list, a line a name, sorted."""
    uses = [Uses(ast.parse(path.read_text("utf-8"))) for path in sorted((ROOT / "sparsecod_megatron").rglob("*.py"))]
    for name in sorted(set().union(*(each.names for each in uses))):
        optional = name.endswith("?")  # a method that the base may not have
        if name.startswith("torch") and not re.search(r"\._\w", name):
            continue
        try:
            yield name.rstrip("?") + parameters(resolve(name.rstrip("?")))
        except LookupError as missing:
            if not optional:
                yield f"{name}: missing ({missing})"
    private = set().union(*(each.private for each in uses)) - set().union(*(each.defined for each in uses))
    words = _private_words()
    for name in sorted(private):
        places = [place for place, found in words.items() if name in found]
        yield f"attribute {name}: {', '.join(places) or 'missing'}"


def _private_words() -> dict[str, set[str]]:
    site = Path(inspect.getfile(importlib.import_module("torch"))).parents[1]
    megatron = Path(importlib.import_module("megatron.core").__path__[0]).parents[1]
    words = {}
    for place in PATHS_SEARCHED:
        base = megatron if place.startswith("megatron") else site
        pattern = place if place.endswith(".py") else f"{place}/**/*.py"
        texts = (path.read_text("utf-8") for path in base.glob(pattern))
        words[place] = set(itertools.chain.from_iterable(re.findall(r"\b_[a-z]\w*", text) for text in texts))
    return words


def differences(recorded: list[str], found: list[str]) -> Iterator[str]:
    """One line a name that is gone, new, or takes other parameters."""
    before, after = ({re.split(r"[(:]", line)[0]: line for line in lines} for lines in (recorded, found))
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, f"{name}: not used"), after.get(name, f"{name}: not used")
        if old == new:
            continue
        if "(" in old and "(" in new and "missing" not in old + new:
            parts = difflib.ndiff(
                *([part.strip("()") for part in text[len(name) :].split(", ")] for text in (old, new))
            )
            yield f"{name}: {', '.join(part for part in parts if part[0] in '+-')}"
        else:
            yield f"{old}  ->  {new}"


def main(arguments: list[str]) -> int:
    """Write or compare; the exit status."""
    warnings.simplefilter("ignore")
    lines = list(contract())
    if arguments == ["--write"]:
        CONTRACT.write_text("\n".join(lines) + "\n", "utf-8")
        return 0
    different = list(differences(CONTRACT.read_text("utf-8").splitlines(), lines))
    print("\n".join(different) or f"{len(lines)} names are as recorded")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
