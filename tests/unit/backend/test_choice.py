"""Which library multiplies: what is fixed, kept and restored, and that a trial runs both alternatives.

Nothing here depends on which library is faster.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import choice, onednn, select_backend
from sparsecod_megatron.backend.choice import Choice
from sparsecod_megatron.errors import ConfigError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
needs_both = pytest.mark.skipif(not onednn.is_available(), reason="torch with one library only")
SECONDS = {
    "output": (1.0, 0.5),
    "input_gradient": (1.0, 0.99),
    "weight_gradient": (1.0, 1.4),
    "experts": (2.0, 1.9),
}
FOUND = Choice(output=True, experts=True)
"""What these seconds mean: half the time, too little to be sure of, more, a twentieth less."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A process that has chosen nothing, on a machine that was never measured; yields the measurements taken."""
    from sparsecod_megatron.backend.cpu import trial

    taken: list[int] = []
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_in_use", [])
    monkeypatch.setattr(trial, "measured_seconds", lambda: taken.append(1) or SECONDS)
    yield taken


def start_again() -> Choice:
    """The choice of the next process."""
    choice._in_use.clear()
    return choice.in_use()


@needs_both
def test_the_faster_is_taken_and_kept_for_this_machine(fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.in_use() == choice.in_use() == FOUND
    assert start_again() == FOUND and len(fresh) == 1
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert start_again() == FOUND and len(fresh) == 2, "what a library may use has changed"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        start_again()
    finally:
        torch.set_num_threads(threads)
    assert len(fresh) == 3, "another number of threads may have another answer"
    assert start_again() == FOUND and len(fresh) == 3
    assert not list(choice.cache_file().parent.glob("*.tmp"))  # type: ignore[union-attr]


@needs_both
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"onednn": "later", "machine": null}', b"\xff", None])
def test_a_file_that_says_nothing_is_measured_anew(
    content: str | bytes | None, fresh: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    choice.in_use()
    path = choice.cache_file()
    assert path is not None
    if content is None:
        path.write_text(path.read_text().replace('"output,experts"', '"of_a_later_version"'))
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.DEBUG, logger="sparsecod"):
        assert start_again() == FOUND
    assert len(fresh) == 2 and sum("cannot be read" in line for line in caplog.messages) <= 1
    assert start_again() == FOUND and len(fresh) == 2, "and mended"


@needs_both
def test_a_cache_that_cannot_be_written_costs_a_measurement(
    fresh: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.DEBUG, logger="sparsecod"):
        assert choice.in_use() == FOUND
    assert sum("cannot be written" in line for line in caplog.messages) == 1
    assert start_again() == FOUND and len(fresh) == 2


@needs_both
def test_without_a_home_nothing_is_kept(fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert choice.in_use() == FOUND and choice.cache_file() is None


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("none", Choice()), ("output, weight_gradient", Choice(output=True, weight_gradient=True))],
)
def test_the_environment_fixes_it(text: str, chosen: Choice, fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, text)
    assert choice.in_use() == chosen == Choice.parse(str(chosen)) and not fresh
    choice.restore({**choice.record(Choice(input_gradient=True))})
    assert choice.in_use() == chosen, "also against what a run recorded"


def test_a_misspelt_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "outputs")
    with pytest.raises(ConfigError, match=r"^SPARSECOD_ONEDNN: 'outputs' is not one of output, .*'none'$"):
        select_backend()


def test_a_run_keeps_its_own_on_such_a_machine(fresh: list[int]) -> None:
    of_the_run = Choice(input_gradient=True)
    recorded = json.loads(json.dumps(choice.record(of_the_run)))
    choice.restore(recorded)
    assert choice.in_use() == of_the_run and not fresh
    choice._in_use.clear()
    for other in (None, {}, {**recorded, "machine": {**recorded["machine"], "torch": "1.0"}}):
        choice.restore(other)
        assert choice._in_use == []


@needs_both
def test_a_trial_runs_both_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every field that this machine has a choice of, whatever it finds."""
    from sparsecod_megatron.backend.cpu import products, trial

    monkeypatch.undo()
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial, "EXPERT_ROWS", range(193, 197))
    asked: list[bool] = []
    for name in ("output", "input_gradient", "add_weight_gradient"):
        product = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, product=product: asked.append(a[-1]) or product(*a))
    before = torch.get_rng_state()
    seconds = trial.measured_seconds()
    assert set(seconds) - {"bf16_rows"} == set(SECONDS)
    assert all(len(pair) == 2 and min(pair) >= 0 for pair in seconds.values())
    assert {True, False} == set(asked)
    assert torch.equal(torch.get_rng_state(), before), "measuring may not change what a run draws"
