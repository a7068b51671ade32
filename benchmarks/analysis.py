"""Depth scores against plain implementations of the same definitions: processor seconds, and whether the numbers agree.

    python -m benchmarks.analysis

The plain ones run the whole model for every intervention and every fit, and one backward pass for every output channel
of every token. Both sides get the same model, text, threads and batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecod_megatron.analysis.scores.base import Result, Score
from sparsecod_megatron.analysis.scores.causal import Causal
from sparsecod_megatron.analysis.scores.context import Context, make_context
from sparsecod_megatron.analysis.scores.jacobian import Jacobian
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.usefulness import Usefulness
from tests.unit.analysis.scores import naive

VOCAB_SIZE = 4096
T = TypeVar("T")


def main() -> None:
    """Measure and print one line a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--jacobian-samples", type=int, default=2, help="sequences of the Jacobian's comparison")
    parser.add_argument("--jacobian-tokens", type=int, default=2, help="tokens of each of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of all but the Jacobian; the fastest counts")
    parser.add_argument("--scores", default="causal,permutation,usefulness,jacobian", help="comma-separated")
    args = parser.parse_args()
    wanted = args.scores.split(",")
    torch.set_num_threads(args.threads)
    context = _context(args, args.samples)
    blocks, windows, upper = context.layers.blocks, context.windows, np.triu_indices(args.layers, k=1)
    model = context.model
    if "causal" in wanted:
        _line("causal", args.repeats, context, Causal(), lambda: naive.causal(model, blocks, windows)[0][upper])
    if "permutation" in wanted:
        plain = naive.permutation
        _line("permutation", args.repeats, context, Permutation(), lambda: plain(model, blocks, windows)[upper])
    if "usefulness" in wanted:
        # The fit needs more tokens than channels: more sequences than the other scores.
        wide = _context(args, 4 * args.samples)
        _line("usefulness", args.repeats, wide, Usefulness(), lambda: _plain_usefulness(wide))
    if "jacobian" in wanted:
        few = _context(args, args.jacobian_samples)
        score = Jacobian(tokens_per_sequence=args.jacobian_tokens)
        _line("jacobian", 1, few, score, lambda: _plain_deviations(few, score), column="deviation")


def _context(args: argparse.Namespace, num_samples: int) -> Context:
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
    return make_context(LlamaForCausalLM(config), tokens, num_samples=num_samples, seq_length=args.seq_length, seed=0)


def _plain_usefulness(context: Context) -> np.ndarray:
    fit, held_out = context.part("fit"), context.part("held_out")
    return naive.usefulness(context.model, context.layers.blocks, fit, held_out, transposed=False)


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
    """Time both, in turns, and print seconds, their ratio and the largest difference."""
    ours, theirs = [], []
    for _ in range(repeats):
        seconds, expected = _timed(plain)
        theirs.append(seconds)
        seconds, result = _timed(lambda: score.run(context))
        ours.append(seconds)
    found = _column(result, name, column or name)
    difference = float(np.abs(found - expected).max())
    print(
        f"{name:12} plain {min(theirs):7.2f} s  ours {min(ours):7.2f} s  {min(theirs) / min(ours):6.1f}×  "
        f"largest difference {difference:.1e} (numbers up to {np.abs(expected).max():.3g})",
        flush=True,
    )


def _column(result: Result, table: str, column: str) -> np.ndarray:
    return np.array([row[column] for row in result.tables[table]])


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds, which a busy machine does not change, and the result."""
    start = time.process_time()
    value = work()
    return time.process_time() - start, value


if __name__ == "__main__":
    main()
