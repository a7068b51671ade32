"""`sparsecod analyze` on two processes: every score, the same numbers as one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.analysis.scores.registry import ASKING, SCORES
from sparsecod_megatron.cli.main import main
from tests.helpers.cli import sparsecod_ranks
from tests.helpers.questions import write_questions
from tests.helpers.words import save_with_words, write_words
from tests.unit.analysis.scores.families import VOCAB_SIZE, tiny

pytestmark = pytest.mark.e2e


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested lists and objects by its path."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in entries for name, leaf in numbers(item, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize(
    ("scores", "length"),
    [([name for name in SCORES if name != "seer_gate"], 32), (["seer_gate"], 100)],  # its blocks are of 64 tokens
    ids=["all", "seer_gate"],
)
def test_two_processes_find_what_one_finds(scores: list[str], length: int, tmp_path: Path) -> None:
    model = save_with_words(tiny("qwen2_moe", max_position_embeddings=128), tmp_path / "model")
    text = write_words(tmp_path / "text.txt", VOCAB_SIZE, 3000)
    command = [
        "analyze",
        str(model),
        "--data",
        str(text),
        "--samples",
        "7",
        "--seq-length",
        str(length),
        "--device",
        "cpu",
    ]
    command += ["--scores", ",".join(scores), "--compat", "reference"]
    if set(scores) & set(ASKING):
        command += ["--task", str(write_questions(tmp_path / "questions.jsonl", VOCAB_SIZE, 7))]
    sparsecod_ranks(*command, "--output", tmp_path / "two", nproc=2)
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "scores.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert list(one["scores"]) == scores
    expected, found = numbers(one), numbers(two)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
        assert found[name] == close, name
    files = [{path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two")]
    assert files[0] == files[1]
