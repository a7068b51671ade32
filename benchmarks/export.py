"""How fast a checkpoint becomes a HuggingFace directory, beside a plain copy of the same bytes.

    bash tools/run_in_venv.sh python3 benchmarks/export.py [--hidden-size 1024] [--repeats 3] [--dtype bf16] [--memory]

A fresh checkpoint of one process is written once; then export and copy take turns, so that a noisy machine slows both
alike. Printed are medians in GB of exported weights a second, and the peak of the process's memory. With --memory, the
commands themselves run on two models, and what is printed is how their memory grows with the model: anonymous pages of
the command and its children, because those of mapped files are the kernel's to take back.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_checkpoint(folder: Path, hidden_size: int) -> None:
    """A dense model of 8 layers, at step 0."""
    backend = select_backend()
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer

    shape = {"num_layers": 8, "hidden_size": hidden_size, "ffn_hidden_size": 3 * hidden_size, "vocab_size": 8192}
    overrides = [f"model.{name}={value}" for name, value in shape.items()]
    config = load_config(None, [*overrides, "model.num_attention_heads=8", "precision.dtype=fp32"])
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        save_checkpoint(folder, state=TrainState(), **trainer.parts)


def export(checkpoint: Path, output: Path, dtype: torch.dtype, *, digests: bool) -> None:
    """What `sparsecod export` does."""
    select_backend()
    from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
    from sparsecod_megatron.hf import export_model

    with streamed_checkpoint(checkpoint, digests=digests) as source:
        export_model(
            source.config.model,
            source.tensors,
            output,
            seq_length=1024,
            dtype=dtype,
            tokenizer_dir=None,
            overwrite=True,
        )


def peak_memory(*arguments: str | Path) -> int:
    """Most anonymous memory, in bytes, that a `sparsecod` command and its children hold at a time."""
    command = [sys.executable, "-m", "sparsecod_megatron", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            running = psutil.Process(process.pid)
            tree = [running, *running.children(recursive=True)]
            peak = max(peak, sum(anonymous_memory(each.pid) for each in tree))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return peak


def anonymous_memory(pid: int) -> int:
    """Bytes of a process's anonymous and shared pages, shared ones in parts; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def print_memory(folder: Path, hidden_sizes: tuple[int, int]) -> None:
    """Peaks of export and import on two models, and what they say about any other."""
    peaks: dict[str, list[int]] = {}
    sizes = []
    for hidden_size in hidden_sizes:
        run, directory, imported = (folder / f"{name}-{hidden_size}" for name in ("run", "hf", "imported"))
        write_apart(run, hidden_size)
        commands: dict[str, tuple[str | Path, ...]] = {
            "export --no-verify": ("export", "--checkpoint", run, "--output", folder / "plain", "--no-verify"),
            "export": ("export", "--checkpoint", run, "--output", directory),
            "import": ("import", "--hf", directory, "--output", imported),
        }
        for name, arguments in commands.items():
            peaks.setdefault(name, []).append(peak_memory(*arguments))
        sizes.append((directory / "model.safetensors").stat().st_size)
        for path in (run, folder / "plain", imported):
            shutil.rmtree(path)
    for name, (small, large) in peaks.items():
        slope = (large - small) / (sizes[1] - sizes[0])
        print(
            f"{name:20} {small / 2**30:.2f} and {large / 2**30:.2f} GiB for {sizes[0] / 2**30:.2f} and "
            f"{sizes[1] / 2**30:.2f} GiB of fp32 weights: {slope:.2f} × the model + "
            f"{(small - slope * sizes[0]) / 2**30:.2f} GiB"
        )


def write_apart(folder: Path, hidden_size: int) -> None:
    """`write_checkpoint` in a process of its own: the trainer's memory is not the export's."""
    command = [sys.executable, __file__, "--write-to", str(folder), "--hidden-size", str(hidden_size)]
    subprocess.run(command, check=True)


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--memory", action="store_true", help="measure the memory of the commands instead")
    parser.add_argument("--write-to", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_to is not None:
        write_checkpoint(args.write_to, args.hidden_size)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory:
            print_memory(folder, (args.hidden_size, args.hidden_size * 3 // 2))
            return
        write_apart(folder / "run", args.hidden_size)
        weights = folder / "hf" / "model.safetensors"
        ways: dict[str, Callable[[], object]] = {
            "export": lambda: export(folder / "run", folder / "hf", DTYPES[args.dtype], digests=False),
            "export, files hashed first": lambda: export(
                folder / "run", folder / "hf", DTYPES[args.dtype], digests=True
            ),
            "copy of the same bytes": lambda: shutil.copyfile(weights, folder / "copy"),
        }
        ways["export"]()
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, action in ways.items():
                times[way].append(seconds(action))
        size = weights.stat().st_size / 1e9
        copy = statistics.median(times["copy of the same bytes"])
        for way, measured in times.items():
            median = statistics.median(measured)
            print(f"{way:28} {size / median:6.2f} GB/s  ({copy / median:.0%} of the copy's speed)")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{size:.2f} GB of weights in {args.dtype}; peak memory of the process, libraries included, {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
