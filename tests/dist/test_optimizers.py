"""Muon, muP's rates and the batch ramp: every layout goes on as one process does, and so does a resumed run."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.backend import select_backend
from tests.dist.conftest import MODELS as BENCH_MODELS
from tests.dist.conftest import SAVED, Bench
from tests.dist.layouts import PP2, VPP2, Layout
from tests.dist.optimizers_worker import BLOCKWISE, LAYOUTS, MODELS, continued, layout_config
from tests.dist.test_layouts import series
from tests.helpers.cli import read_jsonl, script_ranks
from tests.helpers.training import fresh_router_losses, trainer_batches

pytestmark = pytest.mark.dist

Records = list[dict[str, Any]]


def in_one_process(model: str, source: Path) -> Records:
    """The steps after a checkpoint."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    config = layout_config(Layout("single", model, 1, ()))
    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        return continued(config, backend, groups, source)


def two_steps(model: str, folder: Path) -> Path:
    """Checkpoint of one process after two steps."""
    backend = select_backend()
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    config = layout_config(Layout("single", model, 1, ()))
    config.train.seed = 1
    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        trainer = build_trainer(config, backend, groups)
        data = trainer_batches(trainer)
        for _ in range(2):
            train_step(trainer, data)
        return save_checkpoint(folder, trainer, state=TrainState(step=2, optimizer_steps=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Records]:
    """By model, the steps after its checkpoint in FOLDER/MODEL."""
    return {model: in_one_process(model, two_steps(model, folder / model)) for model in MODELS}


@pytest.fixture(scope="module")
def collected(folder: Path, single: dict[str, Records], repo_root: Path) -> dict[str, Records]:
    """By layout, the same steps; the checkpoint as that layout saved it is in FOLDER/LAYOUT."""
    sources = [f"{model}={next((folder / model).glob('step_*'))}" for model in MODELS]
    collected: dict[str, Records] = {}
    for nproc in (2, 4):
        script_ranks(repo_root / "tests/dist/optimizers_worker.py", *sources, folder, nproc=nproc)
        collected |= json.loads((folder / f"{nproc}.json").read_text())
    return collected


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_goes_on_as_one_process(
    layout: Layout, collected: dict[str, Records], single: dict[str, Records]
) -> None:
    """Three fp32 steps: losses to 1e-6, gradient and update sizes of the layers to 1e-5, relative."""
    for ours, theirs in zip(collected[layout.name], single[layout.model], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for layer, expected in zip(ours["layers"], theirs["layers"], strict=True):
            assert layer == pytest.approx(expected, rel=1e-5)


def test_blockwise_is_another_update(collected: dict[str, Records], single: dict[str, Records]) -> None:
    """Negative control: shards orthogonalised by themselves do not pass for whole matrices."""
    ours, theirs = collected[BLOCKWISE.name], single["dense"]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert abs(ours[2]["loss"] - theirs[2]["loss"]) > 1e-4


@pytest.mark.parametrize("name", ["dp2-tp2-sp", "pp2-vpp2", "tp2-ep2-etp1", "pp2-ep2", "mup-ep2"])
def test_what_a_layout_saved_goes_on_in_one_process(
    name: str, folder: Path, collected: dict[str, Records], single: dict[str, Records]
) -> None:
    """Equal as numbers: the state was only moved."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    assert in_one_process(layout.model, next((folder / name).glob("step_*"))) == single[layout.model]


RAMP = ("train.rampup_batch_size=[4,2,16]", "train.micro_batch_size=1")
SIZES = [4] * 2 + [6] * 2 + [8] * 4
"""[4, 2, 16] to 8: eight samples each for 4 and 6."""


@pytest.fixture(scope="module")
def ramp(bench: Bench, initial: dict[str, Path]) -> Path:
    """A ramp in one process."""
    return bench.train("ramp", f"checkpoint.init_from={initial['dense']}", *RAMP)


def test_a_ramp_counts_what_it_reads(ramp: Path) -> None:
    assert series(ramp, "global_batch_size").tolist() == SIZES
    assert series(ramp, "tokens").tolist() == [32 * samples for samples in accumulate(SIZES)]


@pytest.mark.parametrize("overrides", [(), (PP2, VPP2)], ids=["dp2", "pp2-vpp2"])
def test_a_ramp_is_the_same_in_every_layout(
    overrides: tuple[str, ...], bench: Bench, initial: dict[str, Path], ramp: Path
) -> None:
    run = bench.train(f"ramp-{len(overrides)}", f"checkpoint.init_from={initial['dense']}", *RAMP, *overrides, nproc=2)
    assert series(run, "global_batch_size").tolist() == SIZES
    np.testing.assert_allclose(series(run, "loss"), series(ramp, "loss"), rtol=1e-4)


def test_a_resumed_ramp_is_bitwise(bench: Bench, initial: dict[str, Path], ramp: Path) -> None:
    """Stopped after three steps, inside a size."""
    settings = (f"checkpoint.init_from={initial['dense']}", *RAMP)
    bench.train("ramp-stopped", *settings, "train.exit_step=3")
    run = bench.train("ramp-stopped", *settings)
    for field in ("step", "tokens", "global_batch_size", "loss", "grad_norm", "lr"):
        np.testing.assert_array_equal(series(run, field), series(ramp, field), err_msg=field)


def test_muon_learns_text_and_resumes_bitwise(bench: Bench, initial: dict[str, Path]) -> None:
    """Through the command, on the corpus, straight and resumed, statistics and all; unit/train has the other models."""
    settings = (f"checkpoint.init_from={initial['moe']}", *BENCH_MODELS["moe"], "optimizer.optimizer=muon")
    straight = bench.train("muon", *settings)
    losses = series(straight, "loss")
    assert losses[-1] < losses[0] - 0.4
    bench.train("muon-stopped", *settings, f"train.exit_step={SAVED}")
    run = bench.train("muon-stopped", *settings)
    for field in ("loss", "grad_norm", "lr"):
        np.testing.assert_array_equal(series(run, field), series(straight, field), err_msg=field)
    ours, theirs = (read_jsonl(path / "layer_statistics.jsonl") for path in (run, straight))
    assert ours == theirs
