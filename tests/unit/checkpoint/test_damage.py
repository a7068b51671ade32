"""Whatever happens to a checkpoint's files, loading it is refused in one line, and runs nothing that is in them."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from sparsecod_megatron.errors import CheckpointError
from tests.helpers.training import small_trainer

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with small_trainer("model.num_layers=2") as trainer:
        yield trainer


@pytest.fixture(scope="module")
def saved(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of steps 1 and 2, whose tensors differ; the path of the second."""
    from sparsecod_megatron.checkpoint.saver import CheckpointSaver
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step
    from tests.helpers.training import trainer_batches

    data = trainer_batches(trainer)
    with CheckpointSaver(tmp_path_factory.mktemp("damage"), trainer) as saver:
        for step in (1, 2):
            train_step(trainer, data)
            directory = saver.save(TrainState(step=step, optimizer_steps=step))
    return directory


FILES = (
    *("manifest.json", "state.json", "config.yaml", "common.pt", "metadata.json", ".metadata"),
    *("__0_0.distcp", "__0_1.distcp"),
)


def flip(path: Path, where: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, where: float, bit: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(where * len(content))])


def remove(path: Path, where: float, bit: int) -> None:
    path.unlink()


def lengthen(path: Path, where: float, bit: int) -> None:
    path.write_bytes(path.read_bytes() + bytes([bit]))


def swap(path: Path, where: float, bit: int) -> None:
    other = path.with_name(FILES[(FILES.index(path.name) + 1 + bit % 7) % len(FILES)])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def of_another_step(path: Path, where: float, bit: int) -> None:
    """The same file of the checkpoint before, of the same size."""
    origin = {"__0_1.distcp": "__0_1.distcp"}.get(path.name, "__0_0.distcp")
    shutil.copy(path.parent.with_name("before") / origin, path.with_name(origin))


DAMAGES: tuple[Callable[[Path, float, int], None], ...] = (flip, cut, remove, lengthen, swap, of_another_step)


@settings(
    max_examples=80,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(FILES),
    damage=st.sampled_from(DAMAGES),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_damage_is_refused(
    trainer: Trainer, saved: Path, tmp_path: Path, name: str, damage: Any, where: float, bit: int
) -> None:
    """One line that names the checkpoint; it is left as it was."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint

    shutil.rmtree(tmp_path, ignore_errors=True)
    shutil.copytree(saved, tmp_path / "step_00000002")
    shutil.copytree(saved.with_name("step_00000001"), tmp_path / "before")
    directory = tmp_path / "step_00000002"
    damage(directory / name, where, bit)
    left = {path.name: path.read_bytes() for path in directory.iterdir()}
    try:
        state = load_checkpoint(directory, trainer)
    except CheckpointError as error:
        assert str(directory) in str(error) and "\n" not in str(error)
    else:
        # A bit of the manifest's white space may change nothing that it says.
        assert (name, damage) == ("manifest.json", flip) and state.step == 2
    assert left == {path.name: path.read_bytes() for path in directory.iterdir()}


def with_new_manifest(directory: Path) -> None:
    """As someone leaves it who can also write digests."""
    from sparsecod_megatron.checkpoint.manifest import write_manifest

    write_manifest(directory, {})


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES[1:]),
    damage=st.sampled_from((flip, cut)),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_damage_behind_a_right_manifest(
    trainer: Trainer, saved: Path, tmp_path: Path, name: str, damage: Any, where: float, bit: int
) -> None:
    """Bytes of a tensor may be any; everything else is one line, no other exception."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint

    shutil.rmtree(tmp_path, ignore_errors=True)
    directory = tmp_path / "step_00000002"
    shutil.copytree(saved, directory)
    damage(directory / name, where, bit)
    with_new_manifest(directory)
    try:
        load_checkpoint(directory, trainer)
    except CheckpointError as error:
        assert "\n" not in str(error)


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def bomb_common(directory: Path, bomb: Bomb) -> None:
    torch.save({"state": bomb}, directory / "common.pt")


def bomb_metadata(directory: Path, bomb: Bomb) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(bomb))


def bomb_inside_metadata(directory: Path, bomb: Bomb) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = bomb
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def bomb_shard(directory: Path, bomb: Bomb) -> None:
    """Behind the tensors of a shard, where `.metadata` now says that one of the model's lies."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    content = io.BytesIO()
    torch.save(bomb, content)
    stored = metadata.storage_data[index]
    shard = directory / stored.relative_path
    stored.offset, stored.length = shard.stat().st_size, len(content.getvalue())
    shard.write_bytes(shard.read_bytes() + content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("plant", [bomb_common, bomb_metadata, bomb_inside_metadata, bomb_shard])
def test_pickle_bombs_do_not_go_off(
    plant: Callable[[Path, Bomb], None], trainer: Trainer, saved: Path, tmp_path: Path
) -> None:
    from sparsecod_megatron.checkpoint.native import load_checkpoint, load_weights

    directory = tmp_path / "step_00000002"
    shutil.copytree(saved, directory)
    plant(directory, Bomb(tmp_path / "exploded"))
    with_new_manifest(directory)
    with pytest.raises(CheckpointError, match="step_00000002"):
        load_checkpoint(directory, trainer)
    with pytest.raises(CheckpointError, match="step_00000002"):
        load_weights(directory, trainer)
    assert not (tmp_path / "exploded").exists()


class _Named:
    """Pickled as Python 3.11.0 to 3.11.3 do it with a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self.parts = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.parts


def test_members_of_enumerations_are_read_and_nothing_else_by_name() -> None:
    from sparsecod_megatron.checkpoint.untrusted import read_pickle

    classes = {"torch.distributed.checkpoint.planner": {"WriteItemType", "SavePlan"}}
    member = read_pickle(pickle.dumps(_Named(WriteItemType, "TENSOR")), classes, "a plan")
    assert member is WriteItemType.TENSOR
    for kind, name in ((WriteItemType, "mro"), (SavePlan, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="not an enumeration with a member"):
            read_pickle(pickle.dumps(_Named(kind, name)), classes, "a plan")


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """Negative control."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_falls_back_to_the_one_before(
    trainer: Trainer, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says which was damaged, why, and which is used; with none left it is an error."""
    from sparsecod_megatron.checkpoint.native import load_latest
    from sparsecod_megatron.checkpoint.paths import resume_candidates

    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved.parent, checkpoints)
    flip(checkpoints / "step_00000002" / "__0_1.distcp", 0.5, 3)
    with caplog.at_level("WARNING", logger="sparsecod"):
        assert load_latest(resume_candidates(checkpoints), trainer).step == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{checkpoints}/step_00000002: damaged (__0_1.distcp is not what was written: its SHA-256 differs); "
        "using step_00000001 instead"
    ]
    (checkpoints / "step_00000001" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints can be used.*__0_1.distcp"):
        load_latest(resume_candidates(checkpoints), trainer)


def test_verify_false_reads_sizes_only(trainer: Trainer, saved: Path, tmp_path: Path) -> None:
    """Faster, and told: a flipped bit of a weight passes."""
    from dataclasses import replace

    from sparsecod_megatron.checkpoint.manifest import DamagedCheckpoint, check_files

    directory = tmp_path / "step_00000002"
    shutil.copytree(saved, directory)
    flip(directory / "__0_1.distcp", 0.5, 3)
    check_files(directory, digests=replace(trainer.config.checkpoint, verify=False).verify)
    with pytest.raises(DamagedCheckpoint, match="__0_1"):
        check_files(directory, digests=trainer.config.checkpoint.verify)
