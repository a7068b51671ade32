"""Depth scores against plain implementations of the same definitions: processor seconds, and whether the numbers agree.

    python -m benchmarks.analysis
    python -m benchmarks.analysis --memory

The plain ones (`tests/unit/analysis/scores/naive.py`) are what a script around a HuggingFace model does: the whole
model, embedding to loss, for every intervention and once unchanged; one backward pass of the real block for every
output channel of every token. For usefulness there are two: `usefulness` also runs the whole model for every fit;
`one-pass` stores all blocks' activations in a single pass and then takes one lstsq a block. Everything runs in fp32.

Both sides get the same model, text, threads and batch, and run in turns; ratios are of medians. `ratio` is what a user
gains. It has two parts: less work, and matrix products by oneDNN where MKL is slow (`analysis/products.py`).
`same products` gives the plain side oneDNN too, which leaves the first part.

`--memory` prints the peak memory of the process by number of samples, each in a process of its own, for micro-batches
of the same size.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecod_megatron.analysis.analyze import analyze
from sparsecod_megatron.analysis.products import fast_products
from sparsecod_megatron.analysis.scores.base import Result, Score
from sparsecod_megatron.analysis.scores.causal import Causal
from sparsecod_megatron.analysis.scores.context import Context, make_context
from sparsecod_megatron.analysis.scores.jacobian import Jacobian
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.analysis.scores.usefulness import Usefulness

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is not part of the installed package

from tests.unit.analysis.scores import naive

VOCAB_SIZE = 4096
MEMORY_SAMPLES = (16, 64, 256)
MEMORY_GIB = 0.03
"""So little that every sample has micro-batches of the same size."""
MEMORY_SCORES = "causal,permutation,usefulness,jacobian,similarity,skip,lens,attention,activation"
T = TypeVar("T")


def main() -> None:
    """Measure and print one line per score."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        _print_peak(args)
    elif args.memory:
        for num_samples in MEMORY_SAMPLES:
            command = [sys.executable, "-m", "benchmarks.analysis", "--memory-of", str(num_samples)]
            subprocess.run([*command, *sys.argv[1:]], check=True)
    else:
        _compare(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--jacobian-samples", type=int, default=2, help="sequences of the Jacobian's comparison")
    parser.add_argument("--jacobian-tokens", type=int, default=2, help="tokens of each of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="of all but the Jacobian, in turns")
    parser.add_argument("--scores", default="causal,permutation,usefulness,one-pass,jacobian", help="comma-separated")
    parser.add_argument("--memory", action="store_true", help="peak memory by number of samples instead of times")
    parser.add_argument("--memory-of", type=int, metavar="N", help="peak memory with N samples, in this process")
    return parser


def _compare(args: argparse.Namespace) -> None:
    wanted = args.scores.split(",")
    context = _context(args, args.samples)
    model, blocks, windows = context.model, context.layers.blocks, context.windows
    upper = np.triu_indices(args.layers, k=1)
    if "causal" in wanted:
        _line("causal", args.repeats, context, Causal(), lambda: naive.causal(model, blocks, windows)[0][upper])
    if "permutation" in wanted:
        plain = naive.permutation
        _line("permutation", args.repeats, context, Permutation(), lambda: plain(model, blocks, windows)[upper])
    # The fit needs more tokens than channels: more sequences than the other scores.
    wide = _context(args, 4 * args.samples)
    for name, collect in (("usefulness", naive.usefulness), ("one-pass", _one_pass_usefulness)):
        if name in wanted:
            _line(name, args.repeats, wide, Usefulness(), lambda collect=collect: _plain_usefulness(wide, collect))  # type: ignore[misc]
    if "jacobian" in wanted:
        few = _context(args, args.jacobian_samples)
        score = Jacobian(tokens_per_sequence=args.jacobian_tokens)
        _line("jacobian", 1, few, score, lambda: _plain_deviations(few, score), column="deviation")


def _context(args: argparse.Namespace, num_samples: int, memory_gib: float = 2.0) -> Context:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.06,
    )
    tokens = torch.randint(VOCAB_SIZE, ((num_samples + 1) * (args.seq_length + 1),))
    model = LlamaForCausalLM(config)
    sizes = {"num_samples": num_samples, "seq_length": args.seq_length, "seed": 0}
    return make_context(model, tokens, **sizes, memory_gib=memory_gib)


def _plain_usefulness(context: Context, measure: Callable[..., np.ndarray]) -> np.ndarray:
    fit, held_out = context.part("fit"), context.part("held_out")
    return measure(context.model, context.layers.blocks, fit, held_out, transposed=False)


def _one_pass_usefulness(
    model: LlamaForCausalLM,
    blocks: torch.nn.ModuleList,
    fit: torch.Tensor,
    held_out: torch.Tensor,
    *,
    transposed: bool,
) -> np.ndarray:
    """[L] as `naive.usefulness`, the activations to fit on stored in one pass; float64 lstsq, whole model to score."""
    assert not transposed
    loss = naive.mean_loss(model, held_out)
    hidden, _ = naive.run(model, blocks, fit)
    found = []
    for layer, block in enumerate(blocks):
        x, y = (part.flatten(0, 1).double() for part in hidden[layer : layer + 2])
        solution = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution.float()
        with naive.edited(block, lambda before, _after, map=solution: before @ map[:-1] + map[-1]):  # type: ignore[misc]
            found.append(naive.mean_loss(model, held_out) / loss)
    return np.array(found)


def _plain_deviations(context: Context, score: Jacobian) -> np.ndarray:
    """[L] mean over the score's own tokens of ‖J−I‖_F/√d."""
    positions = score.draw_positions(context.num_sequences, context.seq_length, context.generator())
    size, rows = context.hidden_size, []
    for layer in range(len(context.layers)):
        deviations = [
            (naive.token_jacobian(context.model, context.layers.blocks, window, layer, place) - torch.eye(size)).norm()
            for window, places in zip(context.windows, positions.tolist(), strict=True)
            for place in places
        ]
        rows.append(float(torch.stack(deviations).mean()) / size**0.5)
    return np.array(rows)


def _line(
    name: str,
    repeats: int,
    context: Context,
    score: Score,
    plain: Callable[[], np.ndarray],
    *,
    column: str | None = None,
) -> None:
    """Time both, in turns, and print medians, their ratios and the largest difference."""
    seconds: dict[str, list[float]] = {"plain": [], "plain, same products": [], "ours": []}
    for _ in range(repeats):
        expected = _timed(plain, seconds["plain"])
        with fast_products():
            _timed(plain, seconds["plain, same products"])
        result = _timed(lambda: analyze(context, [score], settings={}).results[score.name], seconds["ours"])
    plain_s, same_s, ours_s = (statistics.median(times) for times in seconds.values())
    difference = float(np.abs(_column(result, score.name, column or score.name) - expected).max())
    print(
        f"{name:12} plain {plain_s:7.2f} s  ours {ours_s:7.2f} s  ratio {plain_s / ours_s:5.1f}  same products "
        f"{same_s / ours_s:5.1f}  largest difference {difference:.1e} (numbers up to {np.abs(expected).max():.3g})",
        flush=True,
    )


def _column(result: Result, table: str, column: str) -> np.ndarray:
    return np.array([row[column] for row in result.tables[table]])


def _timed(work: Callable[[], T], seconds: list[float]) -> T:
    """The result; adds processor seconds, which a busy machine changes less than the clock's."""
    start = time.process_time()
    value = work()
    seconds.append(time.process_time() - start)
    return value


def _print_peak(args: argparse.Namespace) -> None:
    """Run every score on a sample of `--memory-of` and print the largest resident set."""
    context = _context(args, args.memory_of, memory_gib=MEMORY_GIB)
    before = _peak_mib()
    for score in find_scores(MEMORY_SCORES.split(",")):
        analyze(context, [score], settings={})
        print(f"{args.memory_of:4} samples, micro-batches of {context.micro_batch}: after {score.name:12} ", end="")
        print(f"peak {_peak_mib():6.0f} MiB, {_peak_mib() - before:5.0f} more than model and imports", flush=True)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
