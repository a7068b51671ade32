"""Ends the build of an image whose parts do not fit: another BASE may bring a Transformer Engine of the wrong version.

Versions first, then what Megatron-Core takes of it is imported, which needs no GPU and finds a build for another
PyTorch. Which Transformer Engine a BASE brings its tag does not tell; this tells when the image is built.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


IMPORTS = ("transformer_engine.pytorch", "megatron.core.extensions.transformer_engine_spec_provider")
"""What a run on CUDA builds its layers from. A machine without a GPU imports both."""


def problems() -> list[str]:
    """One line for each part that does not fit: of a version that pyproject.toml rules out, or not to be imported."""
    return wrong_versions() or failed_imports()


def wrong_versions() -> list[str]:
    """Packages that are missing or of a version that pyproject.toml rules out."""
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


def failed_imports() -> list[str]:
    """Modules that cannot be imported, and whether Megatron-Core has found Transformer Engine."""
    found = []
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # of any kind: what is missing decides where it ends
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(f"{name}: cannot be imported in this image ({reason}); choose another BASE")
    engine = "megatron.core.extensions.transformer_engine"
    if not found and not importlib.import_module(engine).HAVE_TE:
        found.append(f"{engine}: does not find Transformer Engine in this image; choose another BASE")
    return found


if __name__ == "__main__":
    found = problems()
    if not found:
        sys.stdout.write(f"Transformer Engine {metadata.version('transformer-engine')} fits\n")
    sys.exit("\n".join(found) or 0)
