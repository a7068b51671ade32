"""What the documentation says holds: its code runs, its commands parse, its links exist, its lists are complete."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparsecod_megatron.backend.cpu import apply_redirections
from sparsecod_megatron.cli import main as cli
from sparsecod_megatron.compression.registry import LATER_WORDS, METHODS
from sparsecod_megatron.config import data_parallel_size, load_config
from sparsecod_megatron.config.megatron_fields import FIELDS_PASSED, KEYS_OF_FIELDS
from sparsecod_megatron.config.megatron_refused import REFUSALS
from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.config.typed import known_keys
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.studies import load_study
from tests.dist.layouts import LAYOUTS
from tests.unit.test_packaging import tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "sparsecod_megatron"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
SHELL_ENDS = ("|", "&&", ";", ">", "done", "&")
PHRASES = {
    r"\b(?:go|goes|went|going) on\b(?! the\b)": "resume, continue",
    r"(?<!here )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|better\b)": "is not a",
    r"\bnot finite\b": "non-finite",
    r'(?:[.:;?!] |"""|\| |- )Of (?!course\b)': "the subject first",
    r"\b(?:lines?|files?|rows?|CSV|pictures?|jobs?|values?|scales?|gates?|seeds?|objects?|maps?|bars?|times|"
    r"operations|tokens|bytes|experts) a (?:second|step|rank|layer|token(?! uses)|tensor|table|row|score|model|"
    r"block|expert|channel|metric|place|cell|column|value|process|node|family|line|parameter|head)\b": "per",
    r"\bfor ever\b": "forever",
    r"\banew\b": "again, afresh",
    r"\b[Mm]end(?:s|ed|ing)?\b": "fix",
    r"\bwithout a word\b|\bin silence\b": "silently",
    r"\b(?:every|first|after|from|of) so many\b": "this many, every n-th",
}
"""Phrases that a native reader trips over, and what to write instead."""
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="mkdocs is not installed here (pip install -e '.[docs]')"
)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> Any:
    """Parametrizes a test over the pages that have such code."""
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


# ---------------------------------------------------------------- code


@pages_with("python")
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page follow from each other."""
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


@pages_with("yaml")
def test_yaml_loads(page: Path, tmp_path: Path) -> None:
    """Every one is a part of a run's configuration, or a study, without unknown keys."""
    shutil.copy(ROOT / "examples/studies/nano/base.yaml", tmp_path)
    for block in blocks(page, "yaml"):
        file = tmp_path / "config.yaml"
        file.write_text(block)
        if "grid" in yaml.safe_load(block):
            assert len(load_study(file, tmp_path / "out").cells) > 1
        else:
            load_config(file, mechanisms=MECHANISMS)


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `sparsecod` command: of bash blocks, and of indented lines that are no synopsis."""
    text = "\n".join(blocks(page, "bash"))
    text += "\n".join(re.findall(r"^ {4}(sparsecod (?:[^\n[|]*\\\n)*[^\n[|]*)$", page.read_text(), re.MULTILINE))
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "sparsecod" or (word == "sparsecod_megatron" and words[index - 1] == "-m"):
                rest = words[index + 1 :]
                end = next((at for at, other in enumerate(rest) if other in SHELL_ENDS), len(rest))
                yield rest[:end]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    """By the real parsers; a configuration of examples/ also takes the overrides, and fits the processes."""
    for arguments in commands(page):
        if arguments == ["--help"]:
            continue
        module = cli._load(arguments[0])
        parser = argparse.ArgumentParser(prog=" ".join(arguments), exit_on_error=False)
        module.add_arguments(parser)
        parsed = parser.parse_intermixed_args(arguments[1:])
        if arguments[0] in ("train", "plan") and parsed.config.startswith("examples/"):
            words = [word for word in parsed.overrides if "$" not in word]
            config = load_config(ROOT / parsed.config, words, mechanisms=MECHANISMS)
            processes = parsed.gpus if arguments[0] == "plan" else parsed.nproc
            if processes > 1:
                data_parallel_size(config, processes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    """Files that commands and `code` name, modules below the package, and targets of links with their headings."""
    text = page.read_text()
    named = "\n".join([*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", text)])
    for path in re.findall(r"(?<![\w/.])(?:examples|tools|tests|benchmarks|docs)/[\w./-]*[\w/]", named):
        assert list(ROOT.glob(f"{path}*")), f"{page.name}: {path}"
    for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/]+\.py", text):
        assert (PACKAGE / path).exists(), f"{page.name}: {path}"
    for target in re.findall(r"\]\(([^):]+)\)", text):
        file, _, heading = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Headings as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_plain_english() -> None:
    """In pages, and in messages, docstrings and comments of the package."""
    found = []
    for file in [*PAGES, ROOT / "CHANGELOG.md", *PACKAGE.rglob("*.py")]:
        text = re.sub(r"\s+(?:# )?", " ", file.read_text())
        for phrase, better in PHRASES.items():
            for hit in re.finditer(phrase, text):
                context = text[max(hit.start() - 30, 0) : hit.end() + 30]
                found.append(f"{file.relative_to(ROOT)}: {context!r}: write {better}")
    assert not found, "\n".join(found)


# ---------------------------------------------------------------- lists


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its header."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {("", canonicalize_name(Requirement(line).name)) for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        expected |= {(extra, canonicalize_name(Requirement(line).name)) for line in lines}
    cells = [row[0] for row in table("ARCHITECTURE.md", "Dependencies")]
    named = set()
    for cell in cells:
        for part in re.findall(r"[^()]+(?:\(`\w+`\))?", cell):
            extra = re.search(r"\(`(\w+)`\)", part)
            names = part.partition("(")[0].replace(",", " ").split()
            named |= {(extra.group(1) if extra else "", canonicalize_name(name)) for name in names}
    assert named == expected


def test_every_variable_of_a_cluster_is_explained() -> None:
    script = (ROOT / "examples/slurm/environment.sh").read_text()
    names = set(re.findall(r'(?:: "\${|export )(\w+)(?::=|=)', script)) | {"SOCKET_IFNAME"}
    named = "".join(row[0] for row in table("how-to/train-on-a-cluster.md", "Environment"))
    assert len(names) > 10
    assert not [name for name in names if f"`{name}`" not in named and not name.startswith("NCCL_SOCKET")]


def test_picture_and_table_show_every_folder() -> None:
    picture = (DOCS / "architecture.svg").read_text()
    assert sorted(row[0].strip("`/") for row in table("ARCHITECTURE.md", "Layers")) == FOLDERS
    assert all(f">{folder}</text>" in picture for folder in FOLDERS)


def test_every_tested_layout_is_named() -> None:
    page = (DOCS / "PARALLELISM.md").read_text()
    assert not [layout.name for layout in LAYOUTS if f"`{layout.name}`" not in page]


@pytest.mark.parametrize("row", table("PARALLELISM.md", "Refused"), ids=lambda row: row[0])
def test_refused(row: list[str]) -> None:
    kind, code, _ = row[0].split("`")
    model = "nano_moe" if kind.startswith("experts") else "nano_dense"
    with pytest.raises(ConfigError, match="; "):
        data_parallel_size(load_config(ROOT / f"examples/configs/{model}.yaml", code.split()), int(row[1]))


def test_every_mechanism_and_compression_method_has_a_row() -> None:
    """A mechanism's names settings of its own alone."""
    rows = [re.match(r"`(\w+): \{([^}]*)\}`", row[0]) for row in table("MODEL.md", "Mechanisms")]
    settings = {row[1]: set(re.findall(r"(\w+):", row[2])) for row in rows if row is not None}
    pages = ("WEIGHT_SPARSITY.md", "TOKEN_MEMORY.md", "RESIDUAL.md")
    of_pages = [row[0].strip("`") for page in pages for row in table(page, "Methods")]
    assert sorted([*settings, *of_pages]) == sorted(MECHANISMS.names)
    for name, shown in settings.items():
        assert shown <= {item.name for item in dataclasses.fields(MECHANISMS.settings_class(name))}
    tables = (DOCS / "COMPRESSION.md").read_text().split("\n| setting ")[0]
    methods = re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)
    assert sorted(methods) == sorted([*METHODS, *LATER_WORDS])


def test_index_and_navigation_have_every_page() -> None:
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w/-]+\.md)", (DOCS / "index.md").read_text())) == pages
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)) == pages | {"index.md"}


@pytest.mark.skipif(importlib.util.find_spec("emerging_optimizers") is not None, reason="replaces less with it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
def test_readme_counts_what_a_cpu_process_replaces() -> None:
    """Without what this process imported before the backend was chosen."""
    replaced = [each for each in apply_redirections() if each.reason != "compiles at its first call"]
    assert f"replaces {len(replaced)} attributes" in " ".join((ROOT / "README.md").read_text().split())


KNOWN_KEYS = {*known_keys(RunConfig), *(f"megatron.{field}" for field in FIELDS_PASSED)}


@pytest.mark.parametrize("row", table("MEGATRON_FLAGS.md", "The same name"), ids=lambda row: row[0])
def test_flags_of_the_same_name(row: list[str]) -> None:
    fields = [flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", row[1])]
    keys = {field: f"{row[0].strip('`')}.{field}" for field in fields}
    assert fields and not [key for key in keys.values() if key not in KNOWN_KEYS]
    assert not [field for field, key in keys.items() if KEYS_OF_FIELDS.get(field, key) != key]


@pytest.mark.parametrize("row", table("MEGATRON_FLAGS.md", "Another name"), ids=lambda row: row[0])
def test_flags_of_another_name(row: list[str]) -> None:
    keys = re.findall(r"`([\w.]+)`", row[1])
    assert keys and not set(keys) - KNOWN_KEYS
    for flag in re.findall(r"`--([\w-]+)`", row[0]):
        assert KEYS_OF_FIELDS.get(flag.replace("-", "_"), keys[0]) in keys


def test_flags_without_a_key_are_refused() -> None:
    named = {field for row in table("MEGATRON_FLAGS.md", "Not here") for field in re.findall(r"`(\w+)`", row[1])}
    assert named and not named - {field for fields in REFUSALS.values() for field in fields}


# ---------------------------------------------------------------- the site


@needs_mkdocs
def test_api_has_every_public_module() -> None:
    """As the interpreter finds them: whatever defines a public function or class."""
    found = {
        module for modules in runpy.run_path(str(DOCS / "api_pages.py"))["folders"]().values() for module in modules
    }
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        public = re.search(r"^(def|class) [a-zA-Z]", path.read_text(), re.MULTILINE)
        assert name in found or not public or path.stem.startswith("_"), name


@needs_mkdocs
@pytest.mark.slow
def test_site_builds(tmp_path: Path) -> None:
    """Without a warning: every page is in the navigation, every cross-reference of a docstring leads somewhere."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    build(load_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    assert 'id="sparsecod_megatron.metrics.variance.VarianceGroup"' in (tmp_path / "site/api/metrics.html").read_text()
