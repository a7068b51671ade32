"""How fast a checkpoint becomes a HuggingFace directory, beside a plain copy of the same bytes.

    bash tools/run_in_venv.sh python3 benchmarks/export.py [--hidden-size 1024] [--repeats 3] [--dtype bf16]
    bash tools/run_in_venv.sh python3 benchmarks/export.py --memory [--hidden-size 1024] [--tied] [--experts 8]

A fresh checkpoint of one process is written once; then export and copy take turns, so that a noisy machine slows both
alike. Printed are medians in GB of exported weights a second, and the peak of the process's memory. With --memory, the
commands themselves run on two models, and what is printed is how their memory grows with the model: anonymous pages of
the command and its children, which the kernel cannot take back, and all resident ones, those of mapped files included.
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
from typing import NamedTuple

import psutil
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """Sizes of a model of 8 layers.

    Attributes:
        hidden_size: width.
        tied: embeddings are the output layer.
        experts: of a mixture; 0 for a dense model.
    """

    hidden_size: int
    tied: bool = False
    experts: int = 0

    @property
    def overrides(self) -> list[str]:
        """As configuration."""
        sizes = {"num_layers": 8, "hidden_size": self.hidden_size, "vocab_size": 8192, "num_attention_heads": 8}
        if self.experts:
            width = 3 * self.hidden_size // self.experts
            sizes |= {"num_moe_experts": self.experts, "moe_router_topk": 2, "moe_ffn_hidden_size": width}
        else:
            sizes["ffn_hidden_size"] = 3 * self.hidden_size
        overrides = [f"model.{name}={value}" for name, value in sizes.items()]
        return [*overrides, f"model.untie_embeddings_and_output_weights={str(not self.tied).lower()}"]


class Memory(NamedTuple):
    """Bytes that processes hold, pages that several share counted in parts.

    Attributes:
        anonymous: what no file backs.
        resident: all.
    """

    anonymous: int = 0
    resident: int = 0


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """A model at step 0."""
    backend = select_backend()
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer

    config = load_config(None, [*shape.overrides, "precision.dtype=fp32"])
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        save_checkpoint(folder, trainer, state=TrainState())


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


def peak_memory(*arguments: str | Path) -> Memory:
    """Most that a `sparsecod` command and its children hold at a time, of each kind."""
    command = [sys.executable, "-m", "sparsecod_megatron", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = Memory()
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            running = psutil.Process(process.pid)
            tree = [running, *running.children(recursive=True)]
            held = [memory(each.pid) for each in tree]
            peak = Memory(
                max(peak.anonymous, sum(each.anonymous for each in held)),
                max(peak.resident, sum(each.resident for each in held)),
            )
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return peak


def memory(pid: int) -> Memory:
    """Memory of one process; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    fields = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines[1:])}
    return Memory(fields["Pss_Anon"] + fields["Pss_Shmem"], fields["Pss"])


def print_memory(folder: Path, shapes: tuple[Shape, Shape]) -> None:
    """Peaks of export and import on two models, and what they say about any other."""
    peaks: dict[str, list[Memory]] = {}
    sizes = []
    for number, shape in enumerate(shapes):
        run, directory, imported = (folder / f"{name}-{number}" for name in ("run", "hf", "imported"))
        write_apart(run, shape)
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
    print(f"models of {sizes[0] / 2**30:.2f} and {sizes[1] / 2**30:.2f} GiB of fp32 weights")
    for name, (first, second) in peaks.items():
        for kind in ("anonymous", "resident"):
            small, large = getattr(first, kind), getattr(second, kind)
            slope = (large - small) / (sizes[1] - sizes[0])
            print(
                f"{name:20} {kind:9} {small / 2**30:.2f} and {large / 2**30:.2f} GiB: {slope:.2f} × the model + "
                f"{(small - slope * sizes[0]) / 2**30:.2f} GiB"
            )


def write_apart(folder: Path, shape: Shape) -> None:
    """`write_checkpoint` in a process of its own: the trainer's memory is not the export's."""
    sizes = ["--hidden-size", str(shape.hidden_size), "--experts", str(shape.experts), *["--tied"] * shape.tied]
    subprocess.run([sys.executable, __file__, "--write-to", str(folder), *sizes], check=True)


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
    parser.add_argument("--tied", action="store_true", help="embeddings are the output layer too")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture instead of a dense model")
    parser.add_argument("--memory", action="store_true", help="measure the memory of the commands instead")
    parser.add_argument("--write-to", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = Shape(args.hidden_size, args.tied, args.experts)
    if args.write_to is not None:
        write_checkpoint(args.write_to, shape)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory:
            print_memory(folder, (shape, shape._replace(hidden_size=args.hidden_size * 3 // 2)))
            return
        write_apart(folder / "run", shape)
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
