"""`sparsecod export`: a training checkpoint of any layout as a HuggingFace directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecod_megatron.cli.options import check_above_zero, check_at_least

HELP = "Write a training checkpoint as a HuggingFace model directory that plain transformers loads."
EXAMPLE = "sparsecod export --checkpoint runs/nano_dense --output exported/nano_dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod export`."""
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="run directory (its latest step) or step directory"
    )
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="number format of the weights (default fp32)"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes (default 5)"
    )
    parser.add_argument(
        "--no-digests", action="store_true", help="trust the checkpoint's files without hashing them: faster"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits with Megatron's before publishing, and refuse what rounding does not explain, naming the "
        "layer and tensor (on by default; the result is parity.json beside the weights)",
    )
    parser.add_argument(
        "--remove-dead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave neurons or heads out that a mechanism of the run has pruned, down to the most that live in any "
        "layer, since the class has one width for all (on by default)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the tokens that are compared")


def run(args: argparse.Namespace) -> None:
    """Export, verified unless asked not to."""
    check_at_least(args, seed=0)
    check_above_zero(args, "max_shard_gb")
    import torch

    from sparsecod_megatron.backend import select_backend

    select_backend()
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir

    step_dir = resolve_step_dir(args.checkpoint)
    verification = export_checkpoint(
        step_dir,
        args.output,
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        overwrite=args.overwrite,
        digests=not args.no_digests,
        verify=args.verify,
        seed=args.seed,
        remove_dead=args.remove_dead,
        tell=print,
    )
    if verification is not None:
        print(verification.described())
    print(f"{args.output}  from {step_dir}")
