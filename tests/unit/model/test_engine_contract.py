"""Layers of CUDA runs against those of the CPU: the same tensors, and no argument that Transformer Engine lacks.

The other side is a table of the real package's, in a file that `tools/te_on_cpu.sh` writes and compares.
"""

from __future__ import annotations

import ast
import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL
from tests.helpers.tensor_table import VARIANTS, Table, tensors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

backend = select_backend()

from megatron.core.extensions import transformer_engine as extension  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("transformer_engine.json").read_text("utf-8"))
differences = runpy.run_path(str(ROOT / "tools/te_contract.py"))["differences"]


@pytest.fixture(scope="module")
def of_the_cpu() -> dict[str, Table]:
    from sparsecod_megatron.parallel import running_processes

    config = load_config(None, [*SMALL])
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        return {name: tensors(overrides, groups, transformer_engine=False) for name, overrides in VARIANTS.items()}


def test_every_variant_holds_the_same_tensors_on_both_backends(of_the_cpu: dict[str, Table]) -> None:
    assert len(RECORDED["tensors"]) == len(VARIANTS) > 45
    assert differences(RECORDED["tensors"], of_the_cpu) == []


def test_one_other_shape_or_name_is_found(of_the_cpu: dict[str, Table]) -> None:
    """Negative control."""
    changed = copy.deepcopy(of_the_cpu)
    changed["pre"]["decoder.final_layernorm.weight"] = [33]
    changed["tied"]["decoder.other"] = changed["tied"].pop("decoder.final_layernorm.weight")
    assert [line.partition(":")[0] for line in differences(of_the_cpu, changed)] == [
        "/pre/decoder.final_layernorm.weight",
        "/tied/decoder.final_layernorm.weight",
        "/tied/decoder.other",
    ]


def keywords_passed() -> dict[str, set[str]]:
    """Keywords that Megatron-Core's subclasses pass to the constructor of each class of Transformer Engine's."""
    tree = ast.parse(Path(extension.__file__).read_text("utf-8"))
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in map(ast.unparse, node.bases):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                    names = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
                    found.setdefault(base.removeprefix("te.pytorch."), set()).update(names)
    return found


@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"])
def test_megatron_passes_no_argument_that_the_engine_lacks(name: str) -> None:
    passed = keywords_passed()[name]
    assert len(passed) >= 5 and passed <= set(RECORDED["signatures"][name])


def test_the_recorded_version_is_one_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (asked,) = map(Requirement, project["optional-dependencies"]["gpu"])
    assert asked.specifier.contains(RECORDED["version"])
