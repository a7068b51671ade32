"""First step: what is there, what was packed in its place, and whether everything imports.

Its process is fresh on every machine, so that a rehearsal sees the imports that a card's machine does.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from tools.gpu_bring_up.bench import Bench, Skipped

WHEELS, ENGINE = "wheels", "te_*.tar.gz"
"""In the packed folder."""
SITE, ENGINE_SITE = "site", "engine"
"""In the scratch folder: where both go, apart, so that a step can do without Transformer Engine."""
CARD, IMPORTS_ENGINE = "card", "Transformer Engine"
"""Checks whose outcome decides how the other steps run."""
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "pyarrow", "pytest")


def run(bench: Bench) -> None:
    """Install, then import from the outside in."""
    with bench.check("versions", anywhere=True) as found:
        found.values = {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}
        found.figure = ", ".join(f"{name} {version}" for name, version in found.values.items())
    with bench.check("wheels", anywhere=True) as found:
        found.figure = _install(bench)
    with bench.check("Transformer Engine's archive", anywhere=True) as found:
        found.figure = _unpack(bench)
    importlib.invalidate_caches()  # both folders were empty when this process started
    bench = replace(bench, cuda=_see_card(bench))
    with bench.check(IMPORTS_ENGINE) as found:
        found.figure = _import_engine(bench)
    with bench.check("megatron-core", anywhere=True) as found:
        from sparsecod_megatron.backend import select_backend

        backend = select_backend()
        found.figure = f"{_version('megatron-core')}, backend {backend.name}"
        importlib.import_module("megatron.core")
    with bench.check("sparsecod_megatron", anywhere=True) as found:
        for module in ("train", "hf.export", "cli.main", "audit.measure"):
            importlib.import_module(f"sparsecod_megatron.{module}")
        found.figure = "imports"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _install(bench: Bench) -> str:
    wheels = sorted((bench.folder / WHEELS).glob("*.whl"))
    if not wheels:
        raise Skipped(f"no wheels in {bench.folder / WHEELS}; what is installed serves")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(bench.work / SITE)]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip: {done.stderr.strip()[-300:]}")
    return f"{len(wheels)} installed"


def _unpack(bench: Bench) -> str:
    archives = sorted(bench.folder.glob(ENGINE))
    if not archives:
        raise Skipped(f"no {ENGINE} in {bench.folder}")
    target = bench.work / ENGINE_SITE
    with tarfile.open(archives[-1]) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(target, filter="data")
        else:  # a Python without the filter: members may not leave the folder
            assert all(_inside(target, target / name) for name in archive.getnames()), "a member leads elsewhere"
            archive.extractall(target)
    return archives[-1].name


def _inside(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _see_card(bench: Bench) -> bool:
    import torch

    cuda = torch.cuda.is_available()
    with bench.check(CARD, anywhere=True) as found:
        if not cuda:
            raise Skipped("no CUDA device: every later step is rehearsed in small on the CPU")
        torch.zeros(1, device="cuda")
        properties = torch.cuda.get_device_properties(0)
        found.values = {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
        found.figure = ", ".join(f"{name} {value}" for name, value in found.values.items())
    return cuda


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _import_engine(bench: Bench) -> str:
    """Its version; where it does not import, as if it were not there, so that Megatron-Core can be imported."""
    try:
        import transformer_engine.pytorch as engine
    except Exception as error:
        path = str(bench.work / ENGINE_SITE)
        sys.path[:] = [entry for entry in sys.path if entry != path]
        for name in [name for name in sys.modules if name.split(".")[0].startswith("transformer_engine")]:
            del sys.modules[name]
        if bench.cuda:
            raise
        raise Skipped(f"does not import here: {' '.join(str(error).split())[:150]}") from None
    return f"{_version('transformer-engine')} from {Path(engine.__file__).parents[2].name}"
