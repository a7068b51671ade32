"""The package's layering, read from its imports: who may import whom, who may patch Megatron, how long a file gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "sparsecod_megatron"
SENTENCE = (
    "config | backend, parallel | seams | model, data, metrics, hf | mechanisms | checkpoint | "
    "train, analysis, evaluation, planning, compression | models | studies, audit | cli"
)
LAYER_OF = {folder.strip(): layer for layer, group in enumerate(SENTENCE.split("|")) for folder in group.split(",")}
# Files at the top of the package: errors, files and version lie left of every bar, `python -m` right of all of them.
LAYER_OF |= {"errors": -2, "": -2, "files": -1, "__main__": len(SENTENCE.split("|"))}
MAX_LINES = 400
PATCHED_BY_BACKEND_ONLY = ("torch", "megatron", "transformer_engine", "apex")


@dataclass(frozen=True)
class Import:
    """One imported name: `import a.b` is (a.b, ""), `from a import b` is (a, b)."""

    module: str
    name: str
    line: int
    runs_on_import: bool  # neither inside a function nor for type checkers only

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def _absolute(node: ast.ImportFrom, parents: tuple[str, ...]) -> str:
    """The module a `from` statement names, with leading dots resolved against the importing file's package."""
    if not node.level:
        return node.module or ""
    return ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])


def _literal_import(node: ast.Call) -> str | None:
    """The module of `importlib.import_module("...")`, up to the first part that is only known when it runs."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in ("import_module", "__import__") or not node.args:
        return None
    first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) and node.args[0].values else node.args[0]
    return str(first.value).rstrip(".") if isinstance(first, ast.Constant) else None


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(tree: ast.Module, parents: tuple[str, ...]) -> Iterator[Import]:
    """Every import of a file, wherever it stands; `parents` is the dotted package the file lies in, split."""

    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, parents)
            yield from (Import(module, alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.Call) and (module := _literal_import(node)):
            yield Import(module, "", node.lineno, runs)
        if _is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            runs = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runs)

    yield from visit(tree, True)


def _folder(parts: tuple[str, ...]) -> str:
    """The folder (or top-level module) that decides a dotted path's layer: its part right under the package."""
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else ""


def layering_faults(package: Path) -> list[str]:
    """Imports that cross a bar from left to right, or go between folders of one group.

    Args:
        package: the folder of the package, named `sparsecod_megatron`.

    Returns:
        One line a fault: file, line, the import, and what is allowed.
    """
    faults = []
    for file, tree, parts in parsed_files(package):
        own = "" if parts == (PACKAGE, "__init__") else parts[1]
        if own not in LAYER_OF:
            faults.append(f"{file}: folder '{own}' is not in the layering sentence: {SENTENCE}")
            continue
        for found in imports_of(tree, parts[:-1]):
            imported = tuple(found.full.split("."))
            if imported[0] != PACKAGE:
                continue
            target = _folder(imported)
            if not target and (package / Path(*imported[1:2])).is_dir() and len(imported) > 1:
                target = imported[1]  # a folder outside the sentence: reported above, and nothing may import it
            if target != own and LAYER_OF.get(target, len(LAYER_OF)) >= LAYER_OF[own]:
                faults.append(f"{file}:{found.line}: '{own}' must not import '{found.full}' (layers: {SENTENCE})")
    return faults


def cpu_path_faults(package: Path) -> list[str]:
    """Imports that load a piece of the CPU backend before a backend is chosen; only backend/cpu* may do that."""
    faults = []
    for file, tree, parts in parsed_files(package):
        if len(parts) > 2 and parts[1] == "backend" and parts[2].startswith("cpu"):
            continue
        for found in imports_of(tree, parts[:-1]):
            if found.runs_on_import and found.full.startswith(f"{PACKAGE}.backend.cpu"):
                faults.append(f"{file}:{found.line}: '{found.full}' is imported whenever this file is, also under CUDA")
    return faults


def lm_eval_faults(package: Path) -> list[str]:
    """Imports of lm_eval outside evaluation/."""
    return [
        f"{file}:{found.line}: '{found.full}': only evaluation/ imports lm_eval"
        for file, tree, parts in parsed_files(package)
        for found in imports_of(tree, parts[:-1])
        if found.full.split(".")[0] == "lm_eval" and parts[1] != "evaluation"
    ]


def _root_name(node: ast.expr) -> str | None:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_target(node: ast.Attribute | ast.Subscript) -> bool:
    return isinstance(node.ctx, ast.Store | ast.Del)


def _written(node: ast.AST) -> list[ast.expr]:
    """Expressions whose attribute or item this statement sets or deletes."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr") and node.args:
        return [node.args[0]]
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    written = (inner for target in targets for inner in ast.walk(target))
    return [node.value for node in written if isinstance(node, ast.Attribute | ast.Subscript) and _is_target(node)]


def _names_bound_to_libraries(tree: ast.Module) -> Iterator[str]:
    """Names that a file's imports bind to something of torch, Megatron or their CUDA companions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in PATCHED_BY_BACKEND_ONLY:
                yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in PATCHED_BY_BACKEND_ONLY:
                    yield alias.asname or top


def patching_faults(package: Path) -> list[str]:
    """Assignments to attributes of torch's or Megatron's modules, classes and functions outside backend/."""
    faults = []
    for file, tree, parts in parsed_files(package):
        if parts[1] == "backend":
            continue
        foreign = set(_names_bound_to_libraries(tree))
        for node in ast.walk(tree):
            for target in _written(node):
                if _root_name(target) in foreign or ast.unparse(target) == "sys.modules":
                    faults.append(f"{file}:{node.lineno}: '{ast.unparse(node)}' patches a library; only backend/ may")
    return faults


def length_faults(root: Path) -> list[str]:
    """Source files longer than MAX_LINES."""
    folders = [root / name for name in (PACKAGE, "tests", "tools", "benchmarks", "examples")]
    files = [file for folder in folders for kind in ("*.py", "*.sh") for file in sorted(folder.rglob(kind))]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return [
        f"{file.relative_to(root)}: {length} lines, at most {MAX_LINES}: split it"
        for file, length in lengths.items()
        if length > MAX_LINES
    ]


def parsed_files(package: Path) -> Iterator[tuple[str, ast.Module, tuple[str, ...]]]:
    """(path for messages, syntax tree, dotted path split: `("sparsecod_megatron", "model", "norms")`) of each file."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package.parent)
        yield str(relative), ast.parse(path.read_text(encoding="utf-8"), str(path)), relative.with_suffix("").parts


CHECKS = {
    "layers": layering_faults,
    "cpu path": cpu_path_faults,
    "lm_eval": lm_eval_faults,
    "patches": patching_faults,
}


@pytest.mark.parametrize("check", CHECKS)
def test_package_follows_its_layering(repo_root: Path, check: str) -> None:
    faults = CHECKS[check](repo_root / PACKAGE)
    assert not faults, "\n" + "\n".join(faults)


def test_no_source_file_is_too_long(repo_root: Path) -> None:
    faults = length_faults(repo_root)
    assert not faults, "\n" + "\n".join(faults)


# Each row: the check, the file, its text, and what the one message must say (None: the file is fine).
CASES = [
    ("layers", "model/a.py", "from sparsecod_megatron.train.loop import step", "model/a.py:1: 'model' must not import"),
    ("layers", "model/a.py", "import sparsecod_megatron.cli", "sparsecod_megatron.cli"),
    ("layers", "model/a.py", "from sparsecod_megatron import metrics", "sparsecod_megatron.metrics"),
    ("layers", "model/sub/deep.py", "from ...hf import names", "sparsecod_megatron.hf.names"),
    ("layers", "model/a.py", "def f():\n    from ..checkpoint import save", "a.py:2"),
    ("layers", "config/a.py", "import importlib as i\ni.import_module(f'sparsecod_megatron.cli.{1}')", "a.py:2"),
    ("layers", "errors.py", "from sparsecod_megatron.config import load", "errors.py:1"),
    ("layers", "files.py", "from sparsecod_megatron.config import load", "files.py:1"),
    ("layers", "config/a.py", "from sparsecod_megatron.files import write_text", None),
    ("layers", "__init__.py", "from .train import loop", "__init__.py:1"),
    ("layers", "gadgets/one.py", "x = 1", "'gadgets' is not in the layering sentence"),
    ("layers", "model/a.py", "from ..errors import ConfigError\nfrom ..backend import pick\nfrom . import norms", None),
    ("layers", "cli/a.py", "from sparsecod_megatron import __version__\nfrom ..studies import s", None),
    ("layers", "__main__.py", "from sparsecod_megatron.cli.main import main", None),
    ("cpu path", "backend/select.py", "from sparsecod_megatron.backend import cpu", "select.py:1"),
    ("cpu path", "model/specs.py", "if True:\n    from ..backend.cpu.norms import RMSNorm", "specs.py:2"),
    ("cpu path", "backend/select.py", "def start():\n    from .cpu import redirect", None),
    ("cpu path", "backend/cpu/rng.py", "from . import redirection\nfrom ..cpu.moe import route", None),
    ("lm_eval", "train/loop.py", "def f():\n    import lm_eval.tasks", "loop.py:2"),
    ("lm_eval", "evaluation/tasks.py", "import lm_eval", None),
    ("patches", "train/a.py", "import torch\ntorch.cuda.synchronize = print", "a.py:2"),
    ("patches", "train/a.py", "from megatron.core import mpu as m\nm.x, y = 1, 2", "a.py:2"),
    ("patches", "train/a.py", "from torch import Tensor\nsetattr(Tensor, 'cuda', print)", "a.py:2"),
    ("patches", "train/a.py", "import sys\nsys.modules['apex'] = sys", "a.py:2"),
    ("patches", "backend/cuda.py", "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True", None),
    ("patches", "train/a.py", "import torch\nx = torch.zeros(2)\nx.grad = None\nd = {}\nd[torch.float] = x", None),
]


@pytest.mark.parametrize(("check", "file", "text", "message"), CASES)
def test_checks_find_exactly_the_faults(tmp_path: Path, check: str, file: str, text: str, message: str | None) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    faults = CHECKS[check](tmp_path / PACKAGE)
    if message is None:
        assert not faults
    else:
        assert len(faults) == 1
        assert message in faults[0]


def test_long_file_is_named(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "long.py").write_text("x = 1\n" * (MAX_LINES + 1), encoding="utf-8")
    (tmp_path / PACKAGE / "short.py").write_text("x = 1\n" * MAX_LINES, encoding="utf-8")
    assert length_faults(tmp_path) == [f"{PACKAGE}/long.py: {MAX_LINES + 1} lines, at most {MAX_LINES}: split it"]
