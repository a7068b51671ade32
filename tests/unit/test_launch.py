"""Launching on GPUs, as far as it goes without: jobs that fit their nodes, and scripts against a stand-in for Slurm.

Slurm, docker and torchrun are shell scripts here that note how they were called; what torchrun's agents and ranks do is
in tests/dist/test_two_agents.py.
"""

from __future__ import annotations

import contextlib
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.planning import GPUS, make_plan, require_fit

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "examples" / "slurm" / "jobs").glob("*.sh"))
NOTE = 'printf "%s\\n" "$(basename "$0")" "$@" >>"$NOTES"\n'
SLURM = {
    "SLURM_JOB_ID": "21007",
    "SLURM_JOB_NAME": "moe",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "96",
}


class Site:
    """A copy of the scripts, and a folder of stand-ins at the front of PATH.

    Attributes:
        root: what the scripts take for the repository.
        environment: of every command started here.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._bin, self._notes = root / "repository", root / "bin", root / "notes"
        for name in ("slurm", "ngc"):
            shutil.copytree(ROOT / "examples" / name, self.root / "examples" / name)
        (self.root / "tools").mkdir()
        (self.root / "tools" / "run_in_venv.sh").write_text('exec "$@"\n')
        self._bin.mkdir()
        self._started: list[subprocess.Popen[str]] = []
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        self.environment = kept | {"PATH": f"{self._bin}:/usr/bin:/bin", "NOTES": str(self._notes)}
        self.environment["SLURM_SUBMIT_DIR"] = str(self.root)

    def stand_in(self, name: str, script: str = NOTE) -> None:
        """Put a command on PATH."""
        path = self._bin / name
        path.write_text(f"#!/bin/bash\n{script}")
        path.chmod(0o755)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the repository, with variables added to its environment."""
        pipe, variables = subprocess.PIPE, self.environment | environment
        self._started.append(
            subprocess.Popen(
                ["/bin/bash", *command],
                cwd=self.root,
                env=variables,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,
                # A shell cannot trap what was ignored when it started, as SIGINT is in the background.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return self._started[-1]

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """(exit status, stderr) of a command."""
        process = self.start(*command, **environment)
        _, error = process.communicate(timeout=60)
        return process.returncode, error

    def clear(self) -> None:
        """End what a failed test has left."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def noted(self) -> list[str]:
        """Names and arguments of the stand-ins that were called."""
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def until(self, word: str) -> None:
        """Wait for a note."""
        wait(lambda: word in self.noted())


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.clear()


# ---------------------------------------------------------------- jobs


def test_jobs_are_complete() -> None:
    models = ("dense_1B", "dense_1B_fp8", "moe_1B_7B", "moe_1B_7B_fp8")
    assert {job.stem for job in JOBS} == {f"{model}_{nodes}" for model in models for nodes in ("1node", "16nodes")}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_job_fits_its_nodes(job: Path, site: Site) -> None:
    """What the job hands to submit.sh: layout and batch divide 8 GPUs a node, and their memory suffices."""
    site.stand_in("bash", 'printf "%s\\n" "$JOB_NAME" "$@" >>"$NOTES"\n')
    assert site.run(str(site.root / "examples/slurm/jobs" / job.name), "data.prefix=tokens")[0] == 0
    name, script, nodes, config, *overrides = site.noted()
    assert (name, script, overrides[-1]) == (job.stem, "examples/slurm/submit.sh", "data.prefix=tokens")
    assert job.stem.endswith(f"_{nodes}node" if nodes == "1" else f"_{nodes}nodes")
    run = load_config(ROOT / config, overrides)
    require_fit(make_plan(run, 8 * int(nodes), GPUS["h100"]))
    assert run.precision.fp8 == ("fp8" in job.stem)
    assert run.parallel.expert_model_parallel_size == (8 if "moe" in job.stem else 1)


@pytest.mark.parametrize("refused", [False, True])
def test_submit_plans_before_it_queues(refused: bool, site: Site) -> None:
    site.stand_in("bash", NOTE + f"exit {2 if refused else 0}\n")
    site.stand_in("sbatch")
    status, _ = site.run("examples/slurm/submit.sh", "16", "configs/moe.yaml", "a.b=c")
    plan = ["bash", "tools/run_in_venv.sh", "sparsecod", "plan", "configs/moe.yaml", "a.b=c", "--gpus", "128"]
    log = ["--output", "runs/slurm/%x-%j.log"]
    queue = ["sbatch", "--nodes", "16", "--job-name", "moe", *log, "examples/slurm/train.sbatch", "configs/moe.yaml"]
    assert status == (2 if refused else 0)
    assert site.noted() == [*plan, "--gpu", "h100", *([] if refused else [*queue, "a.b=c"])]


# ---------------------------------------------------------------- a job on its nodes


def with_slurm(site: Site, step: str) -> None:
    """Slurm's commands, of which `srun` runs `step`."""
    site.stand_in("srun", NOTE + 'echo "$$" >"$NOTES.pid"\n' + step)
    site.stand_in("scontrol", NOTE + 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi\n')
    site.stand_in("scancel", NOTE + 'kill -USR1 "$(cat "$NOTES.pid")"\n')


def test_step_of_a_job(site: Site) -> None:
    """Container, mounts, rendezvous and run directory; the step's exit status is the job's."""
    with_slurm(site, 'echo "at $MASTER_ADDR:$MASTER_PORT $SPARSECOD_PYTHON" >>"$NOTES"; exit 7\n')
    settings = {"IMAGE": "image.sqsh", "MOUNTS": "/data:/data"}
    status, error = site.run("examples/slurm/train.sbatch", "config.yaml", "a.b=c", **SLURM, **settings)
    assert status == 7, error
    run = f"{site.root}/runs/moe-21007"
    mounts = f"{site.root}:/workspace/sparsecod_megatron,{site.root},{run},/data:/data"
    step = site.noted()[site.noted().index("srun") :]
    assert step[:4] == ["srun", "--cpus-per-task=96", "--kill-on-bad-exit=1", "--label"]
    assert {"--container-image=image.sqsh", f"--container-mounts={mounts}"} <= set(step)
    assert step[-6:-1] == ["bash", "examples/slurm/run_node.sh", "config.yaml", "a.b=c", f"logging.run_dir={run}"]
    assert step[-1] == "at n1:21007 python3"


SAVING_STEP = """trap 'echo saved >>"$NOTES"; exit 0' USR1
trap 'sleep 0.5; echo saved >>"$NOTES"; exit 0' TERM
echo started >>"$NOTES"
while :; do sleep 0.05; done
"""


def test_out_of_time(site: Site) -> None:
    """The step saves, then the job asks for its next round."""
    with_slurm(site, SAVING_STEP)
    job = site.start("examples/slurm/train.sbatch", "config.yaml", **SLURM)
    site.until("started")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    end = site.noted()[site.noted().index("started") + 1 :]
    assert end == ["scancel", "--signal=USR1", "21007", "saved", "scontrol", "requeue", "21007"]


def test_preempted(site: Site) -> None:
    """SIGTERM to the job does not end it before its step has saved; Slurm queues it again, not the script."""
    with_slurm(site, SAVING_STEP)
    job = site.start("examples/slurm/train.sbatch", "config.yaml", **SLURM)
    site.until("started")
    job.send_signal(signal.SIGTERM)
    os.kill(int((site.root.parent / "notes.pid").read_text()), signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert site.noted()[-1] == "saved"


# ---------------------------------------------------------------- a node

RANK = """import os, signal, sys
def note(word):
    open(os.environ["NOTES"], "a").write(word + "\\n")
signal.signal(signal.SIGUSR1, lambda *_: (note("saved"), sys.exit()))
note("started")
while True:
    signal.pause()
"""
"""What a rank does when the signal reaches it; a shell could not handle one that its parents ignore."""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_node_hands_signals_to_its_ranks(number: signal.Signals, site: Site) -> None:
    (site.root / "rank.py").write_text(RANK)
    site.stand_in("torchrun", NOTE + f"{sys.executable} rank.py\n")
    site.stand_in("pkill", f'{shutil.which("pkill")} "$@"\nsleep 0.5\n')  # the ranks are gone before the trap ends
    node = site.start("examples/slurm/run_node.sh", "config.yaml", "a.b=c", **SLURM, MASTER_ADDR="n1", MASTER_PORT="9")
    site.until("started")
    node.send_signal(number)
    assert node.wait(timeout=60) == 0
    noted = site.noted()
    assert noted[-1] == "saved"
    meeting = ["--rdzv-id", "21007.0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:9"]
    assert noted[:7] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8", "--max-restarts", "3"]
    assert noted[7:-2] == [
        "--signals-to-handle",
        "SIGHUP,SIGQUIT",
        *meeting,
        "-m",
        "sparsecod_megatron",
        "train",
        "config.yaml",
        "a.b=c",
    ]


def test_environment_of_a_node(site: Site) -> None:
    """Every variable has its default, and what the caller has set stays."""
    site.stand_in("torchrun", 'env >"$NOTES.env"\n')
    given = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "NCCL_SOCKET_IFNAME": "=ib0",
        "SOCKET_IFNAME": "eth0",
        "RUN_DIR": "/r",
    }
    assert site.run("examples/slurm/run_node.sh", "config.yaml", **given)[0] == 0
    found = dict(line.split("=", 1) for line in Path(f"{site.environment['NOTES']}.env").read_text().splitlines())
    expected = given | {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "WARN",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "8",
    }
    expected |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    expected |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}
    expected |= {
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/r/nccl_trace_rank_",
        "TRITON_CACHE_DIR": f"/tmp/triton-{os.getuid()}",
    }
    assert {name: found.get(name) for name in expected} == expected


def test_open_files_of_a_node(site: Site) -> None:
    """As many as may be, within reason, whatever the limit of the shell that starts it."""
    site.stand_in("torchrun", 'ulimit -Sn >"$NOTES"\n')
    assert site.run("-c", "ulimit -Sn 256; exec bash examples/slurm/run_node.sh config.yaml")[0] == 0
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert site.noted() == [str(65536 if most == resource.RLIM_INFINITY else min(most, 65536))]


# ---------------------------------------------------------------- the image


def test_one_machine_in_docker(site: Site) -> None:
    """What the caller set goes in by name, and the node's script runs inside."""
    site.stand_in("docker")
    run = site.root.parent / "run"
    settings = {"RUN_DIR": str(run), "DATA_DIR": "/data", "NCCL_DEBUG": "INFO", "GPUS": "4"}
    assert site.run("examples/ngc/train_single_node.sh", "config.yaml", **settings)[0] == 0
    noted = site.noted()
    assert noted[-5:] == [
        "sparsecod_megatron",
        "bash",
        "examples/slurm/run_node.sh",
        "config.yaml",
        f"logging.run_dir={run}",
    ]
    passed = {value for flag, value in zip(noted, noted[1:], strict=False) if flag == "--env"}
    assert passed == {f"RUN_DIR={run}", "GPUS_PER_NODE=4", "NCCL_DEBUG"}
    assert f"{site.root}:/workspace/sparsecod_megatron" in noted
    assert "/data:/data:ro" in noted


def test_image_is_pinned() -> None:
    """A tag with its month, and a check that names what an image lacks."""
    base = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("ARG BASE="))
    assert base.partition(":")[2].count(".") == 1
    check = runpy.run_path(str(ROOT / "examples/ngc/check_image.py"))
    found = {line.partition(":")[0] for line in check["problems"]()}
    assert "transformer-engine" in found or shutil.which("nvidia-smi"), "CPU machines have none, and the check says so"
    assert not found & {"torch", "omegaconf"}


def test_the_image_check_imports_what_a_run_takes() -> None:
    """A Transformer Engine whose compiled part is for another PyTorch, as far as its version: fitting."""
    check = runpy.run_path(str(ROOT / "examples/ngc/check_image.py"))
    if shutil.which("nvidia-smi") is None:
        engine, *rest = check["failed_imports"]()
        assert engine.startswith("transformer_engine.pytorch: cannot be imported in this image (ModuleNotFoundError")
        assert engine.endswith("choose another BASE") and not rest
