"""What commands that run a HuggingFace model share: its options, its place, and a training run taken for a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.launch import is_rank
from sparsecod_megatron.errors import CheckpointError, ConversionError

if TYPE_CHECKING:
    from sparsecod_megatron.parallel.processes import Processes


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype, --device and --no-verify."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and computation (default float32)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="of a training run: do not compare the exported model's logits with Megatron's",
    )


def names(text: str | None) -> list[str]:
    """What stands between the commas."""
    return [name for name in map(str.strip, (text or "").split(",")) if name]


def device(asked: str | None) -> str:
    """Where to compute: what --device says, or cuda where there is one; of several GPUs each process takes its own."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def huggingface_directory(path: Path, *, verify: bool = True) -> Iterator[Path]:
    """The model as a HuggingFace directory while the block runs; a checkpoint is exported into a temporary one.

    Args:
        path: HuggingFace directory, training run, or one of its step directories.
        verify: of a checkpoint: compare the logits with Megatron's.

    Raises:
        CheckpointError: neither a model nor a checkpoint.
        ConversionError: a checkpoint that HuggingFace cannot express, or whose files compute something else.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a HuggingFace model directory or a training run")
    if (path / "config.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sparsecod-") as folder:
        output = Path(folder) / "hf"
        _export(path, output, verify=verify)
        yield output


def _export(path: Path, output: Path, *, verify: bool) -> None:
    import torch.distributed as dist

    if verify and (is_rank() or dist.is_initialized()):
        _export_apart(path, output)
        return
    from sparsecod_megatron.backend import select_backend

    select_backend()
    from sparsecod_megatron.checkpoint.exported import export_checkpoint

    export_checkpoint(path, output, verify=verify)


def _export_apart(path: Path, output: Path) -> None:
    """In a process of its own: the comparison builds the model in a process group of one, and this process has others.

    Raises:
        ConversionError: as its line says.
    """
    command = [sys.executable, "-m", "sparsecod_megatron", "export", f"--checkpoint={path}", f"--output={output}"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConversionError(words.removeprefix("sparsecod export: "))


@contextlib.contextmanager
def shared_directory(path: Path, processes: Processes, *, verify: bool = True) -> Iterator[Path]:
    """`huggingface_directory` for all processes: the first makes it, and keeps it until the others leave the block too.

    Collective over all processes.
    """
    with contextlib.ExitStack() as export:
        yield processes.from_first(lambda: export.enter_context(huggingface_directory(path, verify=verify)))
        processes.wait()
