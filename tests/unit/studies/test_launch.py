"""Where cells run: slots on this machine, jobs of a cluster, and what either is said to cost."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.planning import GPUS, make_plan
from sparsecod_megatron.studies import Study, load_study
from sparsecod_megatron.studies.cost import cell_cost, plan_text
from sparsecod_megatron.studies.runner import slot_environments
from sparsecod_megatron.studies.slurm import submit, write_jobs
from tests.unit.studies.conftest import WriteStudy

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(path for path in (ROOT / "examples/studies").glob("*/*.yaml") if path.stem != "base")
STUDIES = {"depth", "weight_decay", "sequence_length", "gqa", "moe", "recipe", "init", "norm"}


def test_processor_threads_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [slot["OMP_NUM_THREADS"] for slot in slot_environments(2, 4)] == ["2", "2"]


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(2, 2)] == ["2,3", "5,7"]
    with pytest.raises(ConfigError, match="launch.slots: 3 of 2 processes need 6 GPUs, 4 are visible"):
        slot_environments(3, 2)


FAKE_SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$JOBS/$(ls "$JOBS" | wc -l)"
echo "$((1000 + $(ls "$JOBS" | wc -l)))"
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the arguments of each job in a file, in the order of submission."""
    folder, program = tmp_path / "jobs", tmp_path / "bin/sbatch"
    folder.mkdir()
    program.parent.mkdir()
    program.write_text(FAKE_SBATCH)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(folder))
    monkeypatch.chdir(ROOT)
    return folder


def test_a_job_a_cell_its_score_behind_it_the_table_last(jobs: Path, write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(seeds=[1], launch={"slurm": {"nodes": 3, "options": ["--time=1:00:00"]}})
    study = load_study(path, tmp_path / "out")
    script = write_jobs(study, study.cells, ["study", str(path), f"--output={study.output}"])
    numbers = submit(script)
    arguments = [(jobs / str(index)).read_text().splitlines() for index in range(len(list(jobs.iterdir())))]
    trainings, scores, table = arguments[0:-1:2], arguments[1:-1:2], arguments[-1]
    assert len(trainings) == len(scores) == len(study.cells) == 4
    for index, cell in enumerate(study.cells):
        job = 1001 + 2 * index
        config = trainings[index][-1]
        assert load_config(config) == cell.config
        assert trainings[index][-2] == "examples/slurm/train.sbatch"
        assert {"--nodes=3", "--time=1:00:00", f"--job-name={cell.name}"} <= set(trainings[index])
        assert f"--export=ALL,RUN_DIR={cell.config.logging.run_dir}" in trainings[index]
        assert f"--dependency=afterok:{job}" in scores[index]
        assert scores[index][-1].endswith(f"--cell {cell.name}")
    assert f"--dependency=afterany:{':'.join(str(1002 + 2 * index) for index in range(4))}" in table
    assert re.search(r"sparsecod study \S+ --output=\S+ --table$", table[-1])
    assert [int(number) for number in numbers] == [1001, 1003, 1005, 1007, 1009]


def test_a_missing_job_script_or_a_refusal_is_one_line(
    jobs: Path, small_study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = write_jobs(small_study, small_study.cells, ["study"])
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="sbatch refused a job .sbatch: error: invalid account"):
        submit(script)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="launch.slurm.script: examples/slurm/train.sbatch: no such file"):
        write_jobs(small_study, small_study.cells, ["study"])


def test_cost_of_a_processor_is_its_operations(small_study: Study) -> None:
    cell = small_study.cells[0]
    cost = cell_cost(small_study, cell)
    flops = 10 * 4 * 16 * flops_per_token(ParameterTable.of(cell.config), 16)
    assert cost.sizes["train_flops"] == flops and cost.gpus == 0
    assert cost.hours == pytest.approx((flops / 20e9 / 3600,) * 2)


def test_what_is_left_takes_as_long_as_what_is_done(small_study: Study) -> None:
    first, diverged, *others = small_study.cells
    cost = cell_cost(small_study, first)
    took = 3 * sum(cell_cost(small_study, cell).hours[0] for cell in others)
    speed = cost.sizes["tokens"] / (3 * cost.hours[0] * 3600)
    assert others and "at the speed" not in plan_text(small_study, {diverged.name: {}})
    text = plan_text(small_study, {first.name: {"tokens_per_s": speed}, diverged.name: {}})
    assert text.endswith(f"; {took:.3g} at the speed of those that are done\n")


@pytest.mark.parametrize("scale", ["nano", "paper"])
def test_every_study_of_the_paper_is_shipped(scale: str) -> None:
    assert {path.stem for path in SHIPPED if path.parent.name == scale} >= STUDIES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_studies_can_run(path: Path, tmp_path: Path) -> None:
    """Every cell is a run that fits its GPUs, and the header's command names the file."""
    study = load_study(path, tmp_path, ["run.data.prefix=data/books", "run.model.vocab_size=50304"])
    assert study.config.name == path.stem and study.config.claims
    assert f"examples/studies/{path.parent.name}/{path.name} " in path.read_text()
    text = plan_text(study, {})
    assert f"{len(study.cells)} of {len(study.cells)} cells to run" in text
    cell = study.cells[-1]
    if path.parent.name == "paper":
        launch = study.config.launch
        plan = make_plan(cell.config, launch.nproc * launch.slurm.nodes, GPUS["h100"])
        assert cell_cost(study, cell).hours[0] == pytest.approx(
            cell.config.train.train_steps * plan.time.seconds.best / 3600
        )
        assert cell.config.train.train_steps == 50_000
    else:
        assert cell_cost(study, cell).sizes["parameters_total"] < 20e6
