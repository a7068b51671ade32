"""`sparsecod export`: a training checkpoint of any layout as a HuggingFace directory."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write a training checkpoint as a HuggingFace model directory that plain transformers loads."
EXAMPLE = "sparsecod export --checkpoint runs/nano_dense --output exported/nano_dense --verify"


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
        action="store_true",
        help="compare logits with Megatron's in fp32 before publishing; refuse above 1e-4, naming layer and tensor",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the tokens that --verify compares on")


def run(args: argparse.Namespace) -> None:
    """Export, and verify if asked."""
    import torch

    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.errors import ConversionError

    select_backend()
    from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
    from sparsecod_megatron.hf import export_model

    if args.max_shard_gb <= 0:
        raise ConversionError(f"--max-shard-gb: {args.max_shard_gb} is not above 0; give the size of a weight file")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with streamed_checkpoint(args.checkpoint, digests=not args.no_digests) as source:
        export_model(
            source.config.model,
            source.tensors,
            args.output,
            seq_length=source.config.data.seq_length,
            dtype=dtype,
            tokenizer_dir=source.tokenizer_dir,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            overwrite=args.overwrite,
            check=(lambda folder: _verify(args, source.step_dir, folder, dtype)) if args.verify else None,
        )
        print(f"{args.output}  from {source.step_dir}")


def _verify(args: argparse.Namespace, step_dir: Path, folder: Path, dtype: object) -> None:
    """The gate: the checkpoint, loaded by Megatron-Core, against the files just written."""
    import torch

    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.checkpoint.whole import whole_model
    from sparsecod_megatron.hf.verify import verify_export

    backend = select_backend()
    assert isinstance(dtype, torch.dtype)
    with whole_model(step_dir, backend) as source:
        verification = verify_export(
            source.model,
            lambda tokens: source.logits(tokens.to(backend.device)).cpu(),
            source.config.model,
            folder,
            dtype=dtype,
            seq_length=source.config.data.seq_length,
            generator=torch.Generator().manual_seed(args.seed),
        )
    verification.require()
    for name, report in (("random", verification.random), ("greedy", verification.greedy)):
        print(
            f"verified on {report.num_tokens} {name} tokens: max |Δlogit| {report.max_difference:.2e} (limit "
            f"{report.tolerance:.0e}), argmax agreement {report.argmax_agreement:.2%}"
        )
