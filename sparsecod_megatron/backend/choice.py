"""Which matrix products oneDNN takes on this machine: whichever of the two libraries was faster when both were timed.

Makers and instruction sets tell too little: two generations of one maker's AVX-512 processors differ by a factor of
two. So both libraries are timed once (`cpu/trial.py`, about a second), and a file in the user's cache keeps what was
found. Another choice changes results by rounding, hence all processes of a run have the first one's, and a run keeps
its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsecod_megatron import __version__
from sparsecod_megatron.backend import onednn
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import write_text

logger = logging.getLogger("sparsecod")

VARIABLE = "SPARSECOD_ONEDNN"
"""Environment variable that fixes the choice: a choice as text."""
NOTHING = "none"
TIME_RATIO = 0.97
"""Share of torch's time below which oneDNN is taken: what differs by less may come out either way."""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that make a library slower than the processor."""


@dataclass(frozen=True)
class Choice:
    """Products that oneDNN takes; all others are torch's own.

    Attributes:
        output: x · weightᵀ of linear layers, fp32.
        input_gradient: input gradients of linear layers, fp32.
        weight_gradient: weight gradients of linear layers, fp32.
        experts: all three of one expert, fp32, with rows rounded up to sizes that come back: oneDNN generates code
            for every new shape.
        bf16_rows: the same rounding in bf16, where torch's own products may be oneDNN's.
    """

    output: bool = False
    input_gradient: bool = False
    weight_gradient: bool = False
    experts: bool = False
    bf16_rows: bool = False

    def __str__(self) -> str:
        return ",".join(name for name, taken in asdict(self).items() if taken) or NOTHING

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of `str`.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        known = [field.name for field in fields(cls)]
        names = [] if text.strip() == NOTHING else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return cls(**dict.fromkeys(names, True))


_in_use: list[Choice] = []


def in_use() -> Choice:
    """This process's choice; the first call takes the environment's, the file's, or measures. Local.

    Raises:
        ConfigError: the environment variable holds no choice.
    """
    if not _in_use:
        _in_use.append(_first())
    return _in_use[0]


def use(choice: Choice) -> None:
    """Multiply by this choice from now on. Local."""
    _in_use[:] = [choice]


def agree() -> Choice:
    """Have all processes use the first one's choice. Collective over all processes.

    Ranks that hold copies of a weight would drift apart otherwise, where nodes differ or no file can be kept.

    Raises:
        ConfigError: as `in_use`.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # whoever measures now has the machine to itself
        found = [str(in_use()) if dist.get_rank() == 0 else NOTHING]
        dist.broadcast_object_list(found, src=0)
        use(Choice.parse(found[0]))
    return in_use()


def requested() -> Choice | None:
    """The environment's choice, or None. Local.

    Raises:
        ConfigError: it does not name a choice.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return Choice.parse(text)
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {error}; give names with commas between them, or '{NOTHING}'") from None


def record(choice: Choice) -> dict[str, Any]:
    """The choice and this machine, as a file keeps it. Local."""
    return {"onednn": str(choice), "machine": machine()}


def restore(recorded: dict[str, Any] | None) -> None:
    """Use what `record` returned, if it was taken on such a machine and the environment does not override it. Local."""
    if recorded is not None and requested() is None and (choice := _choice_for_this_machine(recorded)) is not None:
        use(choice)


def machine() -> dict[str, Any]:
    """Everything that determines which library is faster. Local."""
    limits = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparsecod": __version__,
        **limits,
    }


def processor() -> str:
    """The processor's name, family, model and stepping, where the system reports them. Local."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    numbers = [f"{short} {known[name]}" for short, name in _NUMBERS.items() if name in known]
    return ", ".join([known.get("model name") or platform.machine(), *numbers])


_NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def _first() -> Choice:
    if (choice := requested()) is not None:
        return choice
    if not onednn.is_available():
        return Choice()
    path = cache_file()
    return _read(path) or _measured(path)


def cache_file() -> Path | None:
    """Where this machine's choice is kept, or None if the user has no home directory. Local."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        return None
    number = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return folder / "sparsecod_megatron" / f"products-{number}.json"


def _read(path: Path | None) -> Choice | None:
    try:
        return _choice_for_this_machine(json.loads(path.read_text("utf-8"))) if path and path.exists() else None
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be read (%s); measuring again which library is faster", path, error)
        return None


def _choice_for_this_machine(recorded: Any) -> Choice | None:
    """What a record says, unless it is another machine's or damaged."""
    if not isinstance(recorded, dict) or recorded.get("machine") != machine():
        return None
    try:
        return Choice.parse(str(recorded.get("onednn")))
    except ValueError:  # an earlier or later version's
        return None


def faster_library(seconds: Mapping[str, tuple[float, float]]) -> Choice:
    """The choice by seconds (of torch, of oneDNN) for each field; fields that were not timed are torch's. Local."""
    return Choice(**{name: by_onednn < TIME_RATIO * by_torch for name, (by_torch, by_onednn) in seconds.items()})


def _measured(path: Path | None) -> Choice:
    from sparsecod_megatron.backend.cpu.trial import measured_seconds

    seconds = measured_seconds()
    choice = faster_library(seconds)
    logger.debug("products by oneDNN: %s; seconds by torch and by oneDNN: %s", choice, seconds)
    kept = {**record(choice), "seconds_by_torch_and_onednn": seconds}
    try:
        if path is None:
            raise OSError("no home directory")
        write_text(path, json.dumps(kept))
    except OSError as error:
        logger.debug("%s cannot be written (%s); the next start measures again", path, error)
    return choice
