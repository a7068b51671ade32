"""A checkpoint appears whole or not at all, whatever moment ends the process; deletion keeps what it must."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.checkpoint import directories, manifest
from sparsecod_megatron.checkpoint.directories import commit, delete_superseded, new_directory, superseded
from sparsecod_megatron.checkpoint.directories import remove_leftovers as restart
from sparsecod_megatron.checkpoint.manifest import FILES_REQUIRED, find_damage, write_manifest
from sparsecod_megatron.checkpoint.paths import resume_candidates, step_dir_name
from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.errors import ConfigError


def written(checkpoints: Path, step: int, content: bytes) -> tuple[Path, Path]:
    """A temporary directory whose writers are done, and where it is to go."""
    directory = checkpoints / step_dir_name(step)
    temporary = new_directory(directory)
    for name in FILES_REQUIRED:
        (temporary / name).write_bytes(content + name.encode())
    (temporary / "__0_0.distcp").write_bytes(content)
    (temporary / ".digests-0").write_text(json.dumps({"__0_0.distcp": hashlib.sha256(content).hexdigest()}))
    return temporary, directory


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    """Against hashlib over whole files; the writers' own digests are taken over."""
    temporary, directory = written(tmp_path, 7, b"seven" * 1000)
    commit(temporary, directory)
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    there = {path.name for path in directory.iterdir()} - {"manifest.json"}
    assert set(listed) == there == {*FILES_REQUIRED, "__0_0.distcp"}
    for name, entry in listed.items():
        content = (directory / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert find_damage(directory, digests=True) is None
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000007"]


def test_ranks_share_the_hashing(tmp_path: Path) -> None:
    """A flipped bit of any file is found by exactly one of three ranks; a wrong size by all."""
    temporary, directory = written(tmp_path, 7, b"seven")
    commit(temporary, directory)
    for name in (*FILES_REQUIRED, "__0_0.distcp"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        found = [find_damage(directory, digests=True, share=(rank, 3)) for rank in range(3)]
        assert sum(damage is not None and name in damage for damage in found) == 1
        assert find_damage(directory, digests=False) is None
        (directory / name).write_bytes(content[:-1])
        assert all(find_damage(directory, digests=False, share=(rank, 3)) for rank in range(3))
        (directory / name).write_bytes(content)


def test_unfinished_data_is_not_committed(tmp_path: Path) -> None:
    """A writer that died before it hashed its file."""
    temporary, directory = written(tmp_path, 7, b"seven")
    (temporary / "__1_0.distcp").write_bytes(b"short")
    with pytest.raises(OSError, match="__1_0.distcp"):
        commit(temporary, directory)
    assert not directory.exists() and not (tmp_path / "latest").exists()


class Killed(BaseException):
    """Stands for kill -9: nothing of ours handles it."""


FILE_OPERATIONS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "write_text"),
    (shutil, "rmtree"),
]


def killed_at(monkeypatch: pytest.MonkeyPatch, moment: int, action: Callable[[], None]) -> bool:
    """Run `action`, ended before its `moment`-th file operation; whether it was."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in FILE_OPERATIONS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True
    return False


def test_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving step 2 again, then deleting step 1: after each file operation the next run finds a good one to go on."""
    before, moments = tmp_path / "before", 0
    for step, content in ((1, b"one"), (2, b"two")):
        commit(*written(before, step, content))
    waiting = written(before, 2, b"two again")
    while True:
        checkpoints = tmp_path / str(moments)
        shutil.copytree(before, checkpoints)
        temporary, directory = (checkpoints / path.name for path in waiting)

        def save(checkpoints: Path = checkpoints, temporary: Path = temporary, directory: Path = directory) -> None:
            commit(temporary, directory)
            delete_superseded(checkpoints, current=2, keep_last=1, keep_every=0)

        killed = killed_at(monkeypatch, moments, save)
        for path in directories.step_dirs(checkpoints).values():
            assert find_damage(path, digests=True) is None, f"partial after {moments} operations"
        restart(checkpoints)
        newest = resume_candidates(checkpoints)[0]
        assert newest.name == "step_00000002" and find_damage(newest, digests=True) is None
        assert (newest / "__0_0.distcp").read_bytes() in (b"two", b"two again")
        assert not [path for path in checkpoints.iterdir() if ".tmp-" in path.name or ".old-" in path.name]
        if not killed:
            break
        moments += 1
    assert moments > 15
    assert [path.name for path in resume_candidates(checkpoints)] == ["step_00000002"]


STEPS = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)


@given(steps=STEPS, keep_last=st.integers(0, 4), keep_every=st.integers(0, 20), named=st.lists(st.integers(0, 60)))
def test_what_is_deleted(steps: list[int], keep_last: int, keep_every: int, named: list[int]) -> None:
    """The saved step, later ones, the newest N, multiples of K and named ones stay; of the others nothing does."""
    for current in steps:
        gone = set(superseded(steps, current=current, keep_last=keep_last, keep_every=keep_every, keep_steps=named))
        assert current not in gone and gone <= set(steps)
        for step in steps:
            newer = sum(step < other <= current for other in steps)
            is_multiple = keep_every > 0 and step % keep_every == 0
            stays = keep_last == 0 or step >= current or newer < keep_last or is_multiple or step in named
            assert (step not in gone) == stays


def test_retention_on_disk(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(*written(tmp_path, step, b"x"))
        delete_superseded(tmp_path, current=step, keep_last=2, keep_every=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        *(step_dir_name(step) for step in (20, 40, 50)),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keep_every=10"], "keep_last"),
        (["checkpoint.keep_last=2", "checkpoint.keep_every=15", "checkpoint.save_interval=10"], "save_interval=10"),
        (["checkpoint.keep_last=-1"], "below 0"),
        (["checkpoint.save_timeout_s=-1"], "below 0"),
    ],
)
def test_settings_that_do_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_synchronous_and_verified_by_default() -> None:
    section = RunConfig().checkpoint
    assert section.verify and not section.async_save and section.keep_last == 0


def test_manifest_lists_itself_not(tmp_path: Path) -> None:
    """Writing it again over itself, as a repair by hand does, gives the same."""
    temporary, directory = written(tmp_path, 7, b"seven")
    commit(temporary, directory)
    before = (directory / manifest.MANIFEST_FILE).read_text()
    write_manifest(directory, {})
    assert (directory / manifest.MANIFEST_FILE).read_text() == before
