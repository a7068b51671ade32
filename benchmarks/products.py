"""Matrix products of this machine: both libraries, what is chosen of them, the rate in bf16, and what gaps cost.

    python -m benchmarks.products [--tokens 2048] [--repeats 9] [--threads 1]

Three parts. First what the choice is made by (`backend/cpu/trial.py`), measured now, whatever was kept of an earlier
time. Then GFLOP/s of the products of a wide layer: torch's in fp32 and bf16, oneDNN's in fp32. Last, what a gradient
whose rows lie apart costs the weight gradient, against the same numbers without gaps: hundreds would say that a product
went to a library's reference loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch

from sparsecod_megatron.backend import choice, onednn, select_backend

warnings.simplefilter("ignore")
select_backend()
from sparsecod_megatron.backend.cpu import products, trial  # noqa: E402

WIDTHS = (256, 1024)
"""Widths of the input and the output of the layer whose rates are printed."""


def main() -> None:
    """Print the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(", ".join(f"{name} {value}" for name, value in choice.machine().items()))
    began = time.perf_counter()
    seconds = trial.measured_seconds()
    print(f"chosen for oneDNN, after {time.perf_counter() - began:.1f} s: {choice.faster_library(seconds)}")
    for name, (by_torch, by_onednn) in seconds.items():
        print(f"{name:>16}: torch {1e3 * by_torch:.2f} ms, oneDNN {1e3 * by_onednn:.2f}, {by_onednn / by_torch:.2f} x")
    print_rates(options.tokens, options.repeats)
    print_gaps(options.tokens, options.repeats)


def print_rates(tokens: int, repeats: int) -> None:
    """GFLOP/s of each of the three products, by the best of `repeats`."""
    columns, rows = WIDTHS
    x, weight, grad = torch.randn(tokens, columns), torch.randn(rows, columns), torch.randn(tokens, rows)
    for name, a, b in (("output", x, weight), ("input gradient", grad, weight), ("weight gradient", grad, x)):
        product = getattr(products, name.replace(" ", "_"))
        ways = {
            "torch": partial(product, a, b, False),
            "oneDNN": partial(product, a, b, onednn.is_available()),
            "bf16": partial(product, a.bfloat16(), b.bfloat16(), False),
        }
        flop = 2 * tokens * rows * columns
        rates = {way: flop / min(seconds(run) for _ in range(repeats + 1)) / 1e9 for way, run in ways.items()}
        print(f"{name:>16}: " + ", ".join(f"{way} {rate:.0f} GFLOP/s" for way, rate in rates.items()))


def print_gaps(tokens: int, repeats: int) -> None:
    """The ratio of medians of a weight gradient with and without gaps, for each order in which it may be taken."""
    by_onednn = onednn.is_available()
    for rows, columns in ((384, 256), (256, 384)):
        x, gaps = torch.randn(tokens, columns), torch.randn(tokens, 2 * rows)[:, :rows]
        runs = [partial(products.weight_gradient, grad, x, by_onednn) for grad in (gaps, gaps.contiguous())]
        times = [[seconds(run) for run in runs] for _ in range(repeats + 1)][1:]
        apart, together = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"[{rows}, {columns}]: {apart * 1e3:.2f} ms with gaps, {together * 1e3:.2f} without: {apart / together:.2f}"
        )


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, by the clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
