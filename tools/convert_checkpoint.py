"""`tools/checkpoint/convert.py` as users of Megatron-LM know it: another layout, or from and to HuggingFace.

    python tools/convert_checkpoint.py --load-dir RUN --save-dir OTHER \
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
    python tools/convert_checkpoint.py --loader hf --load-dir MODEL --save-dir RUN
    python tools/convert_checkpoint.py --saver hf --load-dir RUN --save-dir MODEL

Checkpoints here belong to no layout: every layout loads every one. Megatron to Megatron therefore copies the step as it
is, writes the target layout into config.yaml, and reads every tensor of the copy once to see that it loads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

from sparsecod_megatron.cli.main import main as sparsecod
from sparsecod_megatron.errors import SparsecodError

SIZES = {
    "target_tensor_parallel_size": "tensor_model_parallel_size",
    "target_pipeline_parallel_size": "pipeline_model_parallel_size",
    "target_expert_parallel_size": "expert_model_parallel_size",
    "target_expert_tensor_parallel_size": "expert_tensor_parallel_size",
}


def main() -> int:
    """Translate the arguments and convert."""
    # Megatron-Core says at every import what a CPU machine lacks.
    warnings.filterwarnings("ignore", module="megatron")
    args = _parser().parse_args()
    if args.loader == "mcore" and args.saver == "hf":
        return sparsecod(["export", "--checkpoint", args.load_dir, "--output", args.save_dir])
    if args.loader == "hf" and args.saver == "hf":
        print("convert_checkpoint: --loader hf --saver hf: nothing to convert; give mcore for one", file=sys.stderr)
        return 2
    sizes = {ours: getattr(args, theirs) for theirs, ours in SIZES.items() if getattr(args, theirs) is not None}
    if args.loader == "hf" and (status := sparsecod(["import", "--hf", args.load_dir, "--output", args.save_dir])):
        return status
    try:
        if args.loader == "hf":
            _set_layout(Path(args.save_dir), sizes)
        else:
            _copy_step(Path(args.load_dir), Path(args.save_dir), sizes)
    except SparsecodError as error:
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.save_dir}  with {', '.join(f'{name}={size}' for name, size in sizes.items()) or 'the layout it had'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", default="GPT", choices=["GPT"])
    parser.add_argument("--loader", default="mcore", choices=["mcore", "hf"])
    parser.add_argument("--saver", default="mcore", choices=["mcore", "hf"])
    parser.add_argument("--load-dir", required=True, help="run, step or HuggingFace directory")
    parser.add_argument("--save-dir", required=True, help="directory to make")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help="default: as it is")
    return parser


def _copy_step(source: Path, run: Path, sizes: dict[str, int]) -> None:
    """The step, its tokenizer and its configuration as a run directory of its own, complete or not at all."""
    from sparsecod_megatron.backend import select_backend

    select_backend()
    from sparsecod_megatron.checkpoint.paths import point_latest_to, resolve_step_dir, tokenizer_dir
    from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
    from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, TOKENIZER_DIR
    from sparsecod_megatron.files import making_output

    step = resolve_step_dir(source)
    tokenizer = tokenizer_dir(step)
    with making_output(run) as folder:
        copied = folder / CHECKPOINTS_DIR / step.name
        shutil.copytree(step, copied)
        with streamed_checkpoint(copied) as checkpoint:
            for _ in checkpoint.tensors.values():
                pass
        shutil.copyfile(step / CONFIG_FILE, folder / CONFIG_FILE)
        _set_layout(folder, sizes)
        if tokenizer is not None:
            shutil.copytree(tokenizer, folder / TOKENIZER_DIR)
        point_latest_to(copied)


def _set_layout(run: Path, sizes: dict[str, int]) -> None:
    """Write the layout into the run's config.yaml, checked against its model."""
    from sparsecod_megatron.config import load_config, save_config
    from sparsecod_megatron.config.run_files import CONFIG_FILE

    path = run / CONFIG_FILE
    save_config(load_config(path, [f"parallel.{name}={size}" for name, size in sizes.items()]), path)


if __name__ == "__main__":
    sys.exit(main())
