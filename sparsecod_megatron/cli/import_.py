"""`sparsecod import`: a HuggingFace directory as a run directory of ours, at step 0."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecod_megatron.config import RunConfig
    from sparsecod_megatron.hf.source import HFSource

HELP = (
    "Make a run directory at step 0 from a HuggingFace model. Any layout trains on from it: "
    "sparsecod train OUTPUT/config.yaml checkpoint.init_from=OUTPUT logging.run_dir=RUN data.prefix=PREFIX"
)
EXAMPLE = "sparsecod import --hf models/stories260K_hf --output runs/stories --config examples/configs/nano_dense.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod import`."""
    parser.add_argument("--hf", required=True, type=Path, help="model directory with config.json and safetensors")
    parser.add_argument("--output", required=True, type=Path, help="run directory to make; must not exist or be empty")
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        help="configuration to take all sections but `model` from",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the checkpoint's logits with transformers' own reading of the directory before publishing (on by "
        "default; the result is parity.json in the run directory)",
    )


def run(args: argparse.Namespace) -> None:
    """Read everything, then write everything."""
    from sparsecod_megatron.backend import select_backend

    backend = select_backend()
    from sparsecod_megatron.checkpoint.exported import verify_checkpoint
    from sparsecod_megatron.checkpoint.whole import write_weights
    from sparsecod_megatron.config import save_config
    from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, TOKENIZER_DIR
    from sparsecod_megatron.files import making_output
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.hf.tokenizer import has_tokenizer, load_tokenizer
    from sparsecod_megatron.mechanisms.exports import know_extensions
    from sparsecod_megatron.seams.mechanism import configured

    know_extensions()
    source = open_source(args.hf)
    config = run_config(source, args.config)
    vocab_size = config.model.vocab_size or 0
    tokenizer = load_tokenizer(args.hf, vocab_size=vocab_size) if has_tokenizer(args.hf) else None
    with making_output(args.output) as folder:
        tensors = source.tensors(configured(config))
        step_dir = write_weights(tensors, config, folder / CHECKPOINTS_DIR, backend)
        if args.verify:
            found = verify_checkpoint(
                step_dir, config, source.directory, exported_as=None, seq_length=source.seq_length
            )
            found.publish(folder)
        save_config(config, folder / CONFIG_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER_DIR)
    if args.verify:
        print(found.described())
    print(f"{args.output}  from {args.hf} ({source.family.architecture})")


def run_config(source: HFSource, base: Path | None) -> RunConfig:
    """The configuration of the imported run.

    Args:
        source: the model.
        base: file whose other sections, and keys of the model that only training reads, are kept.
    """
    import json

    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.config.model_keys import TRAINING_KEYS
    from sparsecod_megatron.mechanisms import MECHANISMS

    kept = TRAINING_KEYS.keys() - {"make_vocab_size_divisible_by"} if base else frozenset()
    keys = {
        field.name: getattr(source.model, field.name)
        for field in dataclasses.fields(source.model)
        if field.name not in kept | {"init_std", "preset"}
    }
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in keys.items()]
    overrides += [f"mechanisms.{name}={json.dumps(settings)}" for name, settings in source.mechanisms.items()]
    return load_config(
        base, overrides if base else [*overrides, f"data.seq_length={source.seq_length}"], mechanisms=MECHANISMS
    )
