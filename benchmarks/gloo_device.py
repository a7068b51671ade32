"""Training steps of several CPU processes: one gloo device for all groups against one per group, torch's choice.

    bash tools/run_in_venv.sh python3 benchmarks/gloo_device.py [--processes 4] [--repeats 5] [--steps 40]

Each measurement starts new processes, because groups that were left still poll; the two ways take turns. Printed
are medians of the clock per step after two warm-up steps, of a small model under tensor and data parallelism.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config

WAYS = ("own", "shared")
SETTINGS = (
    "parallel.tensor_model_parallel_size=2",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=176",
    "model.num_attention_heads=4",
    "model.vocab_size=512",
    "data.seq_length=64",
    "precision.dtype=fp32",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
)


def worker(way: str, steps: int) -> None:
    """One of the processes; the first prints seconds per step. Collective over all processes."""
    warnings.simplefilter("ignore")
    logging.disable()
    config, backend = load_config(None, SETTINGS), select_backend()
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    if way == "own":
        group = torch.distributed.ProcessGroupGloo
        group.__init__ = group.__init__.__wrapped__  # type: ignore[attr-defined,method-assign]
    tokens = torch.arange(64)[None]
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, 64), "position_ids": tokens}
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        for step in range(steps + 2):
            if step == 2:
                began = time.perf_counter()
            train_step(trainer, [iter([batch] * 4)])
        if torch.distributed.get_rank() == 0:
            print((time.perf_counter() - began) / steps)


def seconds_per_step(way: str, processes: int, steps: int) -> float:
    """From fresh processes."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*starter, __file__, "--worker", way, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="a multiple of 2 (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="of each measurement (default 40)")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.steps)
        return
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            taken[way].append(seconds_per_step(way, args.processes, args.steps))
    own, shared = (statistics.median(taken[way]) for way in WAYS)
    print(
        f"{args.processes} processes: a device per group {own * 1e3:.0f} ms per step, one device {shared * 1e3:.0f} ms"
    )
    print(f"ratio of medians (own / shared): {own / shared:.2f}")


if __name__ == "__main__":
    main()
