"""Fills the folder that a machine without a network is given: wheels, Transformer Engine, tokens, a CPU checkpoint.

It has to lie in a folder of the checkout that git ignores, and to fit, with the checkout, into what the machine takes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_bring_up.environment import ENGINE, WHEELS
from tools.gpu_bring_up.packed import RUN, TOKENS, write_packed
from tools.gpu_bring_up.process import ROOT

LIMIT_BYTES = 64 * 2**20
"""Largest size of the checkout and the folder together."""
WHEEL_LIST = Path(__file__).with_name("wheels.txt")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")


@dataclass(frozen=True)
class Contents:
    """What is put into the folder.

    Attributes:
        wheels: whether to download them.
        archive: of Transformer Engine; None leaves it out.
        corpus: `--input` of `sparsecod data`.
        tokenizer: `--tokenizer`.
        max_documents: of the corpus.
        overrides: of nano_dense.yaml; a checkpoint has 12 bytes per parameter, so not all of its layers.
        steps: that the checkpoint is trained for.
    """

    wheels: bool = True
    archive: Path | None = None
    corpus: str = "stdlib"
    tokenizer: str = "train:4096"
    max_documents: int = 400
    overrides: tuple[str, ...] = ("model.num_layers=2",)
    steps: int = 10


def _sparsecod(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "sparsecod_megatron", *arguments], cwd=ROOT).returncode:
        _refuse(f"sparsecod {arguments[0]} failed (its message is above)")


def pack(folder: Path, contents: Contents) -> str:
    """Fill the folder, which must be new or empty.

    Returns:
        What is in it, in one line.

    Raises:
        SystemExit: in one line: a folder that is not empty, or not in one that git ignores; a command that failed; a
            folder that is too large; no such archive.
    """
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        _refuse(f"{folder} is not empty; give another folder or empty it")
    if not _is_ignored(folder):
        _refuse(f"{folder} is not an ignored folder of {ROOT}; give one below build/")
    if contents.archive is not None and not (contents.archive.match(ENGINE) and contents.archive.is_file()):
        _refuse(
            f"--archive: {contents.archive} is not a file called {ENGINE}; give Transformer Engine's, or leave it out"
        )
    fill(folder, contents)
    return _described(folder)


def fill(folder: Path, contents: Contents, start: Callable[..., object] = _sparsecod) -> None:
    """Put everything into a folder.

    Args:
        folder: absolute.
        contents: what it is.
        start: runs a `sparsecod` command, given its arguments.

    Raises:
        SystemExit: in one line: a command that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if contents.archive is not None:
        shutil.copy(contents.archive, folder)
    if contents.wheels:
        _download(folder / WHEELS)
    data = ("--input", contents.corpus, "--tokenizer", contents.tokenizer, "--output", str(folder / TOKENS))
    start("data", *data, "--max-documents", str(contents.max_documents))
    run = (f"data.prefix={folder / TOKENS}", f"logging.run_dir={folder / RUN}", f"train.exit_step={contents.steps}")
    common = ("backend=cpu", "train.eval_interval=0", "logging.log_interval=1")
    start("train", str(ROOT / "examples/configs/nano_dense.yaml"), *run, *common, *contents.overrides)
    shutil.rmtree(folder / "index_cache", ignore_errors=True)
    write_packed(folder, overrides=contents.overrides, steps=contents.steps)


def _is_ignored(folder: Path) -> bool:
    command = ["git", "-C", str(ROOT), "check-ignore", "--quiet", str(folder.resolve() / "file")]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def _download(wheels: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", f"--dest={wheels}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run([*command, "--requirement", str(WHEEL_LIST)], capture_output=True, text=True)
    if done.returncode:
        _refuse(f"pip: {done.stderr.strip().splitlines()[-1]}")


def _described(folder: Path) -> str:
    sizes = {path.name: _size(path) for path in sorted(folder.iterdir())}
    checkout = _checkout_size()
    total = sum(sizes.values()) + checkout
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    line = f"{folder}: {parts}; with the checkout's {checkout / 1e6:.1f} MB {total / 2**20:.1f} of 64 MiB"
    if total > LIMIT_BYTES:
        _refuse(f"{line}: too much")
    return line


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(_size(entry) for entry in path.iterdir())


def _checkout_size() -> int:
    """Bytes of what git tracks or would."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    paths = (ROOT / name.decode() for name in names if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _refuse(reason: str) -> None:
    raise SystemExit(f"gpu_bring_up.sh: {reason}")
