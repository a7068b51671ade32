"""A run directory that cannot be written is refused; one that an early end left behind is taken up again."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from sparsecod_megatron.backend import choice, select_backend
from sparsecod_megatron.config import load_config, save_config
from sparsecod_megatron.errors import ConfigError

select_backend()
from sparsecod_megatron.train import run_dir  # noqa: E402
from sparsecod_megatron.train.run_dir import RunDirectory, refuse_foreign_run, refuse_unwritable  # noqa: E402


def test_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"logging.run_dir: .*notes/run cannot be written \(Not a directory"):
        refuse_unwritable(tmp_path / "notes" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        refuse_unwritable(tmp_path / "run")


def test_a_file_system_that_takes_no_files() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(ConfigError, match="cannot be written"):
        refuse_unwritable(Path("/proc/self/run"))


def test_asking_leaves_nothing(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def left_behind(run: Path, *overrides: str) -> None:
    """What a run leaves that ended before its first checkpoint."""
    save_config(load_config(None, [f"logging.run_dir={run}", *overrides]), run / "config.yaml")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')


def test_the_same_command_starts_over(tmp_path: Path) -> None:
    left_behind(tmp_path)
    refuse_foreign_run(tmp_path, load_config(None, [f"logging.run_dir={tmp_path}"]), resuming=False)


@pytest.mark.parametrize("override", ["checkpoint.resume=false", "optimizer.lr=0.1"])
def test_another_command_does_not(override: str, tmp_path: Path) -> None:
    left_behind(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        refuse_foreign_run(tmp_path, load_config(None, [f"logging.run_dir={tmp_path}", override]), resuming=False)


def test_versions_are_kept_whenever_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"logging.run_dir={tmp_path}", f"data.tokenizer={tmp_path / 'none'}"])

    def start(last_step: int) -> list[dict]:
        RunDirectory(tmp_path, config, last_step=last_step).close()
        return [json.loads(line) for line in (tmp_path / "versions.jsonl").read_text().splitlines()]

    (line,) = start(0)
    assert line["step"] == 0
    assert line["packages"]["torch"] == metadata.version("torch")
    assert line["packages"].keys() >= {"megatron-core", "transformers", "numpy"}
    assert start(5) == [line]
    later = {**line, "step": 9, "python": "3.99"}
    monkeypatch.setattr(run_dir, "installed_versions", lambda: {key: later[key] for key in later if key != "step"})
    assert start(9) == [line, later]


def test_the_choice_of_products_is_kept_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"logging.run_dir={tmp_path}", f"data.tokenizer={tmp_path / 'none'}"])
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setattr(choice, "_in_use", [])
    of_the_run = choice.Choice(weight_gradient=True)
    for last_step, chosen in ((0, choice.Choice()), (5, of_the_run), (5, of_the_run)):
        RunDirectory(tmp_path, config, last_step=last_step, products=choice.record(chosen)).close()
    lines = [json.loads(line) for line in (tmp_path / "versions.jsonl").read_text().splitlines()]
    assert [line["products"]["onednn"] for line in lines] == ["none", "weight_gradient"]
    run_dir.restore_products(tmp_path)
    assert choice.in_use() == of_the_run
    run_dir.restore_products(tmp_path / "no run")
    assert choice.in_use() == of_the_run
