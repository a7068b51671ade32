"""Output whole or not at all, also where the writing process is killed, and refused early where it cannot be."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.files import (
    check_output,
    check_writable,
    making,
    making_output,
    replacing,
    replacing_output,
    write_text,
)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["old"]
    write_text(path, "new", durable=True)
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["new"]


def write_and_die(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def make_and_die(path: Path) -> None:
    with making(path) as folder:
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("write", [write_and_die, make_and_die])
def test_a_killed_process_leaves_what_was_there(write: Callable[[Path], None], tmp_path: Path) -> None:
    file, folder = tmp_path / "file.json.gz", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "old").write_text("old")
    path = file if write is write_and_die else folder
    process = multiprocessing.get_context("fork").Process(target=write, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert file.read_text() == "old" and [entry.name for entry in folder.iterdir()] == ["old"]
    left = [entry for entry in tmp_path.iterdir() if entry not in (file, folder)]
    assert len(left) == 1 and left[0].name.startswith(".") and left[0].suffix == (".gz" if path is file else ".making")


def test_a_directory_is_whole_or_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with making(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "private").touch(mode=0o600)
    assert (target / "sub" / "private").stat().st_mode & 0o777 == target.stat().st_mode & 0o666
    with pytest.raises(KeyboardInterrupt), making(target) as folder:
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and (target / "sub").is_dir()
    with making(target):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and not list(target.iterdir())


def test_a_directory_in_use_is_replaced_only_if_asked_and_a_model(tmp_path: Path) -> None:
    file, other, model = tmp_path / "file", tmp_path / "other", tmp_path / "model"
    file.touch()
    for folder, name in ((other, "notes"), (model, "config.json")):
        folder.mkdir()
        (folder / name).touch()
    for path, overwrite, message in (
        (file, True, "is a file"),
        (other, True, r"no config\.json"),
        (model, False, "not empty"),
    ):
        with pytest.raises(ConversionError, match=message), making_output(path, overwrite=overwrite):
            raise AssertionError("the block ran")
    with making_output(model, overwrite=True) as folder:
        (folder / "new").touch()
    assert [entry.name for entry in model.iterdir()] == ["new"]


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        check_writable(tmp_path / "file" / "eval")
    check_output(tmp_path / "a" / "b.json")
    with pytest.raises(ConfigError, match="is a file; give a path in a folder"):
        check_output(tmp_path / "file" / "plan.json")
    with pytest.raises(ConfigError, match="cannot be written"), replacing_output(tmp_path / "file" / "plan.json"):
        raise AssertionError("the block ran")
