"""What `sparsecod compress` holds in memory, whole and with --stream, on models that differ in their number of blocks.

    bash tools/run_in_venv.sh python3 benchmarks/compression_memory.py [--hidden-size 1024] [--layers 2 6] [--method M]
    bash tools/run_in_venv.sh python3 benchmarks/compression_memory.py --model DIR --data TEXT

The first form writes Llamas with random weights, and words. Peaks are of resident memory, pages of mapped files
included. What the libraries hold is measured on a model of one narrow block and taken off. Beside it stands what has to
be there: embeddings and head, one block, and Σ x·xᵀ of a block's inputs. `returned` is with an allocator that gives
freed memory back at once (`MALLOC_MMAP_THRESHOLD_`), so that it is what is in use.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SAMPLES, HELD_OUT, SEQ_LENGTH = 8, 8, 128
VOCAB_SIZE = 4096
MIB = 2**20


class Parts(NamedTuple):
    """Bytes of a model in fp32, and of what its compression has to hold.

    Attributes:
        model: all weights.
        outside: weights outside the blocks.
        block: one block.
        products: Σ x·xᵀ of a block's four inputs.
    """

    model: int
    outside: int
    block: int
    products: int

    @property
    def needed(self) -> int:
        """What no way of going block by block can do without."""
        return self.outside + self.block + self.products


def write_model(folder: Path, hidden_size: int, num_layers: int) -> None:
    """A Llama with random weights and a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": num_layers}
    config = LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, num_attention_heads=8, num_key_value_heads=8)
    LlamaForCausalLM(config).save_pretrained(folder)


def parts_of(folder: Path) -> Parts:
    """Sizes from a directory's configuration and the headers of its files."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config, shapes = AutoConfig.from_pretrained(folder), {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    products = 4 * (3 * width**2 + inner**2)
    return Parts(sum(sizes.values()), sum(sizes.values()) - inside, inside // layers, products)


def peak(folder: Path, data: Path, output: Path, *extra: str, returned: bool = False) -> int:
    """Most bytes that the command has resident at a time."""
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(MIB)} if returned else {})
    sizes = {"samples": SAMPLES, "held-out": HELD_OUT, "seq-length": SEQ_LENGTH, "batch-size": 1}
    command = [sys.executable, "-m", "sparsecod_megatron", "compress", "--model", str(folder), "--data", str(data)]
    command += ["--output", str(output), "--device", "cpu", *extra]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    found = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it may have ended
            held = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            found = int(held[1]) << 10 if held else found
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--method", default="wanda", help="a pruning rule")
    parser.add_argument("--model", type=Path, default=None, help="a Llama directory instead")
    parser.add_argument("--data", type=Path, default=None, help="text for it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        words, data = root / "words.txt", args.data
        words.write_text(" ".join(f"w{number * 7919 % VOCAB_SIZE}" for number in range(4 * SAMPLES * SEQ_LENGTH)))
        models = {"narrow": root / "narrow"} | {f"{n} blocks": root / str(n) for n in args.layers if not args.model}
        if args.model:
            models[args.model.name] = args.model
        shapes = [(64, 1), *((args.hidden_size, count) for count in args.layers)]
        for folder, shape in zip(models.values(), shapes, strict=False):
            if folder.parent == root:
                code = f"from compression_memory import *; write_model(Path({str(folder)!r}), *{shape})"
                subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        print("MiB: the model; what has to be there; held by the whole model, by --stream, and returned; seconds")
        libraries: dict[str, int] = {}
        for label, folder in models.items():
            text = data if data and folder == args.model else words
            held, seconds = {}, {}
            for way, extra in (("whole", ()), ("stream", ("--stream",)), ("returned", ("--stream",))):
                began, output = time.perf_counter(), root / f"out-{folder.name}-{way}"
                rule = ("--method", args.method)
                held[way] = peak(folder, text, output, *rule, *extra, returned=way == "returned")
                seconds[way] = time.perf_counter() - began
            if not libraries:
                libraries = held
                print(f"libraries: {' and '.join(f'{size / MIB:.0f}' for size in libraries.values())}")
                continue
            parts = parts_of(folder)
            needed = " + ".join(f"{size / MIB:.0f}" for size in parts[1:])
            own = " and ".join(f"{(held[way] - libraries[way]) / MIB:.0f}" for way in held)
            took = " and ".join(f"{value:.0f}" for value in seconds.values())
            print(f"{label}: {parts.model / MIB:.0f}; {needed} = {parts.needed / MIB:.0f}; {own}; {took}", flush=True)


if __name__ == "__main__":
    main()
