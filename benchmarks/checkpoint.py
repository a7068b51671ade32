"""How long a save keeps the training waiting: synchronous and asynchronous.

    bash tools/run_in_venv.sh python3 benchmarks/checkpoint.py [--saves 6] [--hidden-size 256]

One process; the two ways take turns, with one training step between, in a temporary folder. Printed are medians: what
`save` blocks, and what passes until the checkpoint is committed. The first save of each way starts helper processes and
is left out.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import CheckpointConfig, load_config

WAYS = {
    "synchronous": CheckpointConfig(async_save=False, keep_last=1),
    "asynchronous": CheckpointConfig(async_save=True, keep_last=1),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=6, help="saves of each way (default 6)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the eight-layer model (default 256: 10M)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    width = args.hidden_size
    shape = (f"model.hidden_size={width}", f"model.ffn_hidden_size={width * 11 // 4}", "model.num_attention_heads=8")
    size = ("model.num_layers=8", "model.vocab_size=8192", "data.seq_length=256", "precision.dtype=fp32")
    config, backend = load_config(None, [*shape, *size, "train.global_batch_size=2"]), select_backend()
    from sparsecod_megatron.checkpoint.saver import CheckpointSaver
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    tokens = torch.randint(8192, (1, 256), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(1, 256),
        "position_ids": torch.arange(256)[None],
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        trainer = build_trainer(config, backend, groups)
        blocking: dict[str, list[float]] = {name: [] for name in WAYS}
        whole: dict[str, list[float]] = {name: [] for name in WAYS}
        for step in range(1, args.saves + 2):
            for name, section in WAYS.items():
                train_step(trainer, [iter([batch, batch])])
                parts = replace(trainer, config=replace(config, checkpoint=section))
                with CheckpointSaver(Path(folder) / name, parts) as saver:
                    began = time.perf_counter()
                    directory = saver.save(TrainState(step=step))
                    blocked = time.perf_counter() - began
                    saver.finish()
                    if step > 1:
                        blocking[name].append(blocked)
                        whole[name].append(time.perf_counter() - began)
        mib = sum(path.stat().st_size for path in directory.iterdir()) / 2**20
    for name in WAYS:
        print(
            f"{name:>12}: blocks {statistics.median(blocking[name]):6.3f} s, committed after "
            f"{statistics.median(whole[name]):6.3f} s ({mib:.0f} MiB)"
        )


if __name__ == "__main__":
    main()
