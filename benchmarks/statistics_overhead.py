"""What layer statistics cost a training step: off, then variance, activations or everything every step.

    bash tools/run_in_venv.sh python3 benchmarks/statistics_overhead.py [--steps 40] [--experts 8] [KEY=VALUE ...]

One process trains one model of 10M parameters; the ways take turns, step by step and each first in its turn, so that a
noisy machine slows all of them alike. Printed are medians of clock and processor time, and their ratios to `off`;
on a shared machine trust processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import IntervalConfig, RunConfig, StatisticsConfig, load_config

INTERVAL_ONE, INTERVAL_NONE = IntervalConfig(interval=1), IntervalConfig(interval=0)
WAYS = {
    "off": StatisticsConfig(variance=INTERVAL_NONE),
    "variance": StatisticsConfig(variance=INTERVAL_ONE),
    "activation": StatisticsConfig(variance=INTERVAL_NONE, activation=INTERVAL_ONE),
    "everything": StatisticsConfig(
        variance=INTERVAL_ONE, moments=INTERVAL_ONE, norms=INTERVAL_ONE, router=INTERVAL_ONE, activation=INTERVAL_ONE
    ),
}


WARM_UP = 3
"""Steps of each way that are not measured."""


def model_config(experts: int, *overrides: str) -> RunConfig:
    """A grouped-query model of 10M parameters on 2,048 tokens per step; with experts, as wide in active parameters."""
    shape = [
        "model.num_layers=8",
        "model.hidden_size=256",
        "model.ffn_hidden_size=704",
        "model.num_attention_heads=8",
        "model.num_query_groups=2",
        "model.vocab_size=8192",
        "precision.dtype=fp32" if not torch.cuda.is_available() else "precision.dtype=bf16",
        "data.seq_length=256",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ]
    if experts:
        shape += [f"model.num_moe_experts={experts}", "model.moe_ffn_hidden_size=352"]
    return load_config(None, [*shape, *overrides])


def random_batches(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of random tokens."""
    shape = (config.train.micro_batch_size, config.data.seq_length)
    generator = torch.Generator().manual_seed(0)
    assert config.model.vocab_size is not None
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        positions = torch.arange(shape[1]).expand(shape)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape), "position_ids": positions}


def measure(config: RunConfig, backend: Backend, *, steps: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step by way, of the clock and of the processor, over `steps` of each.

    Args:
        config: a checked run of one process.
        backend: the selected backend.
        steps: of each way, after the warm-up.
    """
    from sparsecod_megatron.audit.measure import release
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.clock import synchronize
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.statistics import statistics_collector
    from sparsecod_megatron.train.step import train_step

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        collectors = {
            name: statistics_collector(replace(trainer, config=replace(config, statistics=section)))
            for name, section in WAYS.items()
        }
        batches = [random_batches(config)]
        for step in range(1, steps + WARM_UP + 1):
            turn = step % len(WAYS)
            for name in [*WAYS][turn:] + [*WAYS][:turn]:
                collector = collectors[name]
                synchronize(backend.device)
                began = time.perf_counter(), time.process_time()
                train_step(trainer, batches, observing=collector.collecting(step))
                collector.reduce(step)
                synchronize(backend.device)  # or the end of this update would count as the next way's
                if step > WARM_UP:
                    seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        release(trainer)
    clock, processor = ({name: [pair[k] for pair in pairs] for name, pairs in seconds.items()} for k in (0, 1))
    return {name: (statistics.median(clock[name]), statistics.median(processor[name])) for name in WAYS}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each way (default 40)")
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer (default 0: dense)")
    parser.add_argument("overrides", nargs="*", help="of the model, such as model.activation=relu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    median = measure(model_config(args.experts, *args.overrides), select_backend(), steps=args.steps)
    for name, pair in median.items():
        parts = zip(("clock", "processor"), pair, median["off"], strict=True)
        print(
            f"{name:>10}:", *(f"{1000 * value:7.1f} ms {kind}, {value / off:.3f} x off;" for kind, value, off in parts)
        )


if __name__ == "__main__":
    main()
