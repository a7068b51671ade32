"""`sparsecod grow`: a run with more layers, copies of its own, that continues where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Make a deeper run from a checkpoint: each new layer is a copy of one that it has, with fp32 weights and moments; "
    "step and place in the data stay. Prints what that does to the loss."
)
EXAMPLE = "sparsecod grow runs/nano_dense --layers 0,1,2,3,2,3,4,5 --silence --output runs/nano_dense_grown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod grow`."""
    parser.add_argument("run", type=Path, help="run directory (its latest checkpoint) or one of its step directories")
    parser.add_argument("--layers", required=True, help="the layer that each new one copies, from 0: 0,1,2,1,2,3")
    parser.add_argument("--output", required=True, type=Path, help="run directory to make; must not exist or be empty")
    parser.add_argument(
        "--silence",
        action="store_true",
        help="output projections of copies are zero, so that the model computes what it did, bit for bit",
    )


def run(args: argparse.Namespace) -> None:
    """Write the run and print what changed."""
    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.errors import ConfigError

    try:
        layers = [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {args.layers}: not numbers of layers; give them as 0,1,2,1,2,3") from None
    select_backend()
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.checkpoint.state import saved_config

    step_dir = resolve_step_dir(args.run)
    saved = saved_config(step_dir)
    backend = select_backend(saved.backend, precision=saved.precision, cpu_kernels=saved.cpu_kernels)
    from sparsecod_megatron.train.grow import grow

    grown = grow(step_dir, layers, args.output, backend, silence=args.silence)
    print(
        f"{args.output}  {len(layers)} layers from {saved.model.num_layers} of {step_dir.name}: "
        f"loss {grown.before:.4f} → {grown.after:.4f} on the earlier model's predictions of random tokens, "
        f"largest |Δlogit| {grown.largest:.3g}; continue with: sparsecod train {args.output / 'config.yaml'}"
    )
