"""What every test shares: paths, the skip of GPU tests without a GPU, and caches apart from the user's own."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPO_ROOT = Path(__file__).resolve().parent.parent
THREADS, ADDRESSES = 200, 4 << 30
"""What this process may have gained since the last garbage collection, in threads and bytes of address space; the test
that brings it beyond is followed by the next."""


def pytest_configure(config: pytest.Config) -> None:
    """Point the libraries' caches at a folder of this session and keep them offline, before any of them is imported."""
    # Machines are shared and noisy; time is no test's matter. New draws find what others missed, but CI judges a
    # change by the same ones as the change before.
    settings.register_profile("sparsecod", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("sparsecod")
    cache = tempfile.TemporaryDirectory(prefix="sparsecod-tests-")
    config.add_cleanup(cache.cleanup)
    # Where it is set, every process that a test starts would compile the whole package anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.update(HF_HOME=cache.name, HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
    # Which library multiplies must not depend on who was faster at the time.
    os.environ["SPARSECOD_ONEDNN"] = "none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests by name on machines without CUDA; torch is only imported where such a test was collected.

    What several processes do takes as long as the machine lets it; every wait there ends by itself (`helpers/pace.py`).
    Files with long tests come first: workers take whole files in this order, and none should begin a long one last.
    """
    long = {item.path for item in items if any(map(item.get_closest_marker, ("dist", "e2e", "slow")))}
    items.sort(key=lambda item: item.path not in long)
    for item in items:
        if item.get_closest_marker("dist"):
            item.add_marker(pytest.mark.timeout(0))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave what the tests imported out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout these tests belong to."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Offline texts, tokenizers, models and evaluation sets that lie beside the checkout on some machines."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def little_garbage(left: list[int]) -> Iterator[None]:
    """Free closed process groups and their models, which are full of cycles.

    Until then a gloo group keeps its threads; and a process with more address space than there is memory cannot fork.
    """
    yield
    now = _threads_and_addresses()
    if now[0] > left[0] + THREADS or now[1] > left[1] + ADDRESSES:
        gc.collect()
        left[:] = _threads_and_addresses()


@pytest.fixture(scope="session")
def left() -> list[int]:
    """What the last garbage collection has left: some threads of gloo stay, for which no later test shall collect."""
    return _threads_and_addresses()


def _threads_and_addresses() -> list[int]:
    process = Path("/proc/self")
    if not (process / "task").exists():
        return [0, 0]
    pages = int((process / "statm").read_text().split()[0])
    return [sum(1 for _ in (process / "task").iterdir()), pages * os.sysconf("SC_PAGE_SIZE")]
