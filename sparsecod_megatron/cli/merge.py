"""`sparsecod merge`: the mean of a run's checkpoints as a run directory of its own, at step 0."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecod_megatron.checkpoint.decay_curves import CURVES, coefficients

HELP = (
    "Average checkpoints of one model, by coefficients that stand for a decay of the learning rate (WSM, arXiv "
    "2507.17634). The result is a run directory at step 0: export, eval, analyze and checkpoint.init_from take it."
)
EXAMPLE = "sparsecod merge runs/nano_ling --last 4 --curve cosine --output runs/nano_ling_merged"
MERGE_FILE = "merge.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod merge`."""
    parser.add_argument("paths", nargs="+", type=Path, help="one run directory with --last, or step directories by age")
    parser.add_argument("--output", required=True, type=Path, help="run directory to make; must not exist or be empty")
    parser.add_argument("--last", type=int, default=None, help="how many of the run's newest checkpoints are averaged")
    parser.add_argument(
        "--curve",
        choices=[*CURVES],
        default="linear",
        help="decay that the coefficients stand for; linear (the default) is the plain mean",
    )


def run(args: argparse.Namespace) -> None:
    """Read everything, then write everything."""
    import json
    import shutil

    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.errors import ConfigError

    if args.last is not None and args.last < 2:
        raise ConfigError(f"--last {args.last}: a mean needs at least 2 checkpoints; raise it")
    backend = select_backend()
    from sparsecod_megatron.checkpoint.merging import chosen_steps, mergeable_config, merged_tensors
    from sparsecod_megatron.checkpoint.paths import tokenizer_dir
    from sparsecod_megatron.checkpoint.whole import write_weights
    from sparsecod_megatron.config import save_config
    from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, TOKENIZER_DIR
    from sparsecod_megatron.files import making_output, write_text

    steps = chosen_steps(args.paths, args.last)
    config, weights = mergeable_config(steps), coefficients(args.curve, len(steps))
    with making_output(args.output) as folder:
        write_weights(merged_tensors(steps, weights), config, folder / CHECKPOINTS_DIR, backend)
        save_config(config, folder / CONFIG_FILE)
        if (tokenizer := tokenizer_dir(steps[-1])) is not None:
            shutil.copytree(tokenizer, folder / TOKENIZER_DIR)
        named = [{"checkpoint": str(step), "coefficient": weight} for step, weight in zip(steps, weights, strict=True)]
        write_text(folder / MERGE_FILE, json.dumps({"curve": args.curve, "checkpoints": named}, indent=2) + "\n")
    print(
        f"{args.output}  the mean of {len(steps)} checkpoints ({args.curve}): {', '.join(step.name for step in steps)}"
    )
