"""What is installed where a run is trained: the first place to look when numbers differ later."""

from __future__ import annotations

import functools
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparsecod_megatron.config.run_files import VERSIONS_FILE


def recorded_versions(run_dir: Path) -> dict[str, Any] | None:
    """What a run's last start recorded: `step`, and as `installed_versions`; None where none did. Local."""
    path = run_dir / VERSIONS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None


@functools.cache
def installed_versions() -> dict[str, Any]:
    """Python, the platform, what PyTorch was built with, and every installed package by name. Local.

    Packages are named as pip names them, in alphabetical order; CUDA and NCCL are null in a CPU build.
    """
    packages = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "nccl": nccl and ".".join(map(str, nccl)),
        "packages": dict(sorted(packages.items())),
    }
