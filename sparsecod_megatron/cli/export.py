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
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with Megatron's in fp32 before publishing; refuse above 1e-4",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the tokens that --verify compares on")


def run(args: argparse.Namespace) -> None:
    """Export, and verify if asked."""
    import torch

    from sparsecod_megatron.backend import select_backend

    backend = select_backend()
    from sparsecod_megatron.checkpoint.whole import WholeModel, whole_model
    from sparsecod_megatron.hf import compare_logits, export_model

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32

    def verify(source: WholeModel, directory: Path) -> None:
        with torch.no_grad():
            for parameter in source.model.parameters():
                parameter.copy_(parameter.to(dtype))
        generator = torch.Generator().manual_seed(args.seed)
        shape = (4, min(source.config.data.seq_length, 256))
        assert source.config.model.vocab_size is not None
        tokens = torch.randint(source.config.model.vocab_size, shape, generator=generator)
        report = compare_logits(lambda ids: source.logits(ids.to(backend.device)).cpu(), directory, tokens=tokens)
        report.require()
        print(
            f"verified on {report.num_tokens} tokens: max |Δlogit| {report.max_difference:.2e} (limit "
            f"{report.tolerance:.0e}), "
            f"argmax agreement {report.argmax_agreement:.2%}"
        )

    with whole_model(args.checkpoint, backend) as source:
        export_model(
            source.config.model,
            source.tensors(),
            args.output,
            seq_length=source.config.data.seq_length,
            dtype=dtype,
            tokenizer_dir=source.tokenizer_dir,
            overwrite=args.overwrite,
            check=(lambda directory: verify(source, directory)) if args.verify else None,
        )
        print(f"{args.output}  from {source.step_dir}")
