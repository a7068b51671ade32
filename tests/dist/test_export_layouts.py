"""A trained model exports to the same bytes whatever layout saved it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.checkpoint.paths import resolve_step_dir
from tests.dist.conftest import Bench
from tests.dist.layouts import LARGE_LAYOUTS, LAYOUTS, Layout
from tests.helpers.cli import script_ranks, sparsecod

pytestmark = pytest.mark.dist


def weights(directory: Path) -> dict[str, bytes]:
    """Every safetensors file of an export."""
    files = {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
    assert files
    return files


@pytest.fixture(scope="module")
def exported(bench: Bench, reference: dict[str, Path]) -> dict[str, Path]:
    """The single-process runs, exported and verified."""
    result = {}
    for model, run in reference.items():
        result[model] = bench.directory / f"exported-{model}"
        output = sparsecod("export", "--checkpoint", run, "--output", result[model]).stdout
        assert "argmax agreement 100.00%" in output
    return result


@pytest.fixture(scope="module")
def relaid(bench: Bench, reference: dict[str, Path], repo_root: Path) -> Path:
    """The trained weights, saved again under every layout."""
    folder = bench.directory / "relaid"
    script = repo_root / "tests" / "dist" / "relayout_worker.py"
    for nproc in (2, 4):
        script_ranks(script, *(f"{model}={run}" for model, run in reference.items()), folder, nproc=nproc)
    return folder


@pytest.mark.parametrize("layout", [*LAYOUTS, *LARGE_LAYOUTS], ids=lambda layout: layout.name)
def test_same_bytes(layout: Layout, exported: dict[str, Path], relaid: Path, tmp_path: Path) -> None:
    """Exports of one process's checkpoint and of the layout's are equal file by file."""
    sparsecod("export", "--checkpoint", relaid / layout.name, "--output", tmp_path / "hf", "--no-verify")
    assert weights(tmp_path / "hf") == weights(exported[layout.model])


def digests(run: Path) -> dict[str, dict[str, int]]:
    """Of the optimizer's tensors, by parameter."""
    found: dict[str, dict[str, int]] = json.loads((resolve_step_dir(run) / "state.json").read_text())["digests"]
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, *LARGE_LAYOUTS], ids=lambda layout: layout.name)
def test_same_digests(layout: Layout, reference: dict[str, Path], relaid: Path) -> None:
    """What a checkpoint says of fp32 weights and moments is what one process says of them."""
    expected = digests(reference[layout.model])
    assert all(set(kinds) == {"param", "exp_avg", "exp_avg_sq"} for kinds in expected.values())
    assert len({*map(str, expected.values())}) == len(expected) > 8
    assert digests(relaid / layout.name) == expected


def test_plain_transformers_loads_it(exported: dict[str, Path]) -> None:
    """Stock classes, no remote code, and the tokenizer beside the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {}
    for model, directory in exported.items():
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        names[model] = type(loaded).__name__
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer("The router skips", return_tensors="pt").input_ids
        assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    assert names == {"dense": "LlamaForCausalLM", "moe": "Qwen2MoeForCausalLM"}
