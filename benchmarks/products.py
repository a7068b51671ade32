"""What a gradient whose rows lie apart costs the weight gradient, against the same numbers without gaps.

    bash tools/run_in_venv.sh python3 benchmarks/products.py [--tokens 1024] [--repeats 9]

Both take turns; printed is the ratio of medians, for each order in which the product may be taken. A ratio of hundreds
says that a product went to a library's reference loop.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from sparsecod_megatron.backend import onednn, select_backend

warnings.simplefilter("ignore")
select_backend()
from sparsecod_megatron.backend.cpu import products  # noqa: E402


def seconds(grad: torch.Tensor, x: torch.Tensor) -> float:
    """Of one weight gradient."""
    began = time.perf_counter()
    products.weight_gradient(grad, x)
    return time.perf_counter() - began


def processor() -> str:
    """Its name, family and model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return f"{known.get('model name')}, family {known.get('cpu family')}, model {known.get('model')}"


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    library = "oneDNN" if onednn.is_faster() else "MKL"
    print(f"{processor()}, {torch.get_num_threads()} threads, products by {library}")
    onednn.is_faster = lambda: True  # what is asked for is whether oneDNN is given the right ones
    for rows, columns in ((384, 256), (256, 384)):
        x, gaps = torch.randn(options.tokens, columns), torch.randn(options.tokens, 2 * rows)[:, :rows]
        dense = gaps.contiguous()
        times = [(seconds(gaps, x), seconds(dense, x)) for _ in range(options.repeats + 1)][1:]
        apart, together = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"[{rows}, {columns}]: {apart * 1e3:.2f} ms with gaps, {together * 1e3:.2f} without: {apart / together:.2f}"
        )


if __name__ == "__main__":
    main()
