"""Two nodes on loopback, started as examples/slurm/run_node.sh does: one dies, comes back, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Bench
from tests.dist.test_layouts import series
from tests.helpers.cli import free_port
from tests.helpers.pace import PACE
from tests.helpers.running import end, ended_with_block, until

pytestmark = pytest.mark.dist

OVERRIDES = ("train.train_steps=16", "checkpoint.save_interval=4", "statistics.moments.interval=0")


@contextlib.contextmanager
def node(bench: Bench, run: Path, port: int, log: Path, *, host: bool) -> Iterator[subprocess.Popen[bytes]]:
    """One agent with one rank, all of which is gone after the block; the host holds the store of the rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-id=two-agents", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command += [f"--rdzv-conf=is_host={host},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"]
    command += ["--local-addr=127.0.0.1", "-m", "sparsecod_megatron", "train", str(bench.config), *OVERRIDES]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, f"logging.run_dir={run}"], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    with ended_with_block(process):
        yield process


def test_a_node_that_dies_and_returns(bench: Bench, tmp_path: Path) -> None:
    straight = bench.train("two-agents-straight", *OVERRIDES, nproc=2)
    run, port, log = tmp_path / "run", free_port(), tmp_path / "log"
    steps = run / "metrics.jsonl"
    with node(bench, run, port, log, host=True) as first:
        with node(bench, run, port, log, host=False) as second:
            until(lambda: steps.exists() and steps.read_text().count("\n") >= 6, first, log=log)
            end(second)
        assert first.poll() is None
        with node(bench, run, port, log, host=False) as second:
            assert first.wait(timeout=PACE.patience_s) == 0, log.read_text()[-4000:]
            assert second.wait(timeout=PACE.patience_s) == 0, log.read_text()[-4000:]
    assert "resumed from step" in log.read_text()
    for field in ("step", "loss", "grad_norm", "tokens"):
        np.testing.assert_array_equal(series(run, field), series(straight, field), err_msg=field)
