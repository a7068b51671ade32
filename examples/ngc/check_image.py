"""Ends the build of an image whose parts do not fit: another BASE may bring a Transformer Engine that is too new.

Reads versions only, because nothing of CUDA can be imported where there is no GPU.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def problems() -> list[str]:
    """One line for each package that is missing or of a version that pyproject.toml rules out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    found = []
    for requirement in map(Requirement, wanted):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{requirement.name}: not in this image; choose another BASE")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            needed = requirement.specifier
            found.append(f"{requirement.name}: {version} in this image, needs {needed}; choose another BASE")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or 0)
