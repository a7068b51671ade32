"""What a few steps of a run spend time and memory on: a trace, a table of operations, a snapshot of the allocator.

torch does all of it; here is when it begins and ends, and where its files go. A run that asks for nothing has no hook.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from sparsecod_megatron.config import ProfileConfig
from sparsecod_megatron.config.run_files import PROFILE_DIR
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import replacing
from sparsecod_megatron.model import unwrap
from sparsecod_megatron.train.clock import synchronize

logger = logging.getLogger("sparsecod")

PARTS = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
"""Parts of a layer that have ranges of their own."""
TABLE_ROWS = 50
"""Operations in the table, those that take most time first."""


class StepProfiler:
    """Traces this process's part of the steps that the configuration names.

    Args:
        section: section of the configuration.
        run_dir: RUN.
        models: model chunks of this rank.
        device: where they are.

    Raises:
        ConfigError: a rank that the run does not have.
    """

    def __init__(
        self, section: ProfileConfig, run_dir: Path, models: Sequence[torch.nn.Module], device: torch.device
    ) -> None:
        size = dist.get_world_size()
        if section.steps and max(section.ranks) >= size:
            raise ConfigError(f"profile.ranks: {max(section.ranks)}, but the run has {size} processes, from 0")
        self._section, self._models, self._device = section, models, device
        self._first, self._last = section.steps or (0, 0)
        if dist.get_rank() not in section.ranks:
            self._first = self._last = 0
        self._folder = run_dir / PROFILE_DIR
        self._running = contextlib.ExitStack()
        self._trace: profile | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Write what was traced when the block ends before the last step to trace does. Local."""
        try:
            yield
        finally:
            if self._trace is not None:
                self._end()

    def begin(self, step: int) -> None:
        """Before `step`: start if it is the first to trace, or the first that a resumed run has left of them. Local."""
        if self._trace is not None or not self._first <= step <= self._last:
            return
        synchronize(self._device)
        cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._name = f"rank_{dist.get_rank()}_from_step_{step}"
        if self._section.layers:
            self._running.enter_context(layer_ranges(self._models, nvtx=cuda))
        if self._section.memory and cuda:
            torch.cuda.memory._record_memory_history()
        self._trace = profile(activities=activities, profile_memory=self._section.memory, record_shapes=True)
        self._trace.start()

    def end(self, step: int) -> None:
        """After `step`: stop and write if it is the last to trace. Local."""
        if self._trace is not None and step >= self._last:
            self._end()

    def _end(self) -> None:
        assert self._trace is not None
        trace, self._trace = self._trace, None
        synchronize(self._device)
        trace.stop()
        self._running.close()
        cuda = self._device.type == "cuda"
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = trace.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=TABLE_ROWS)
        try:
            self._write(".json.gz", lambda path: trace.export_chrome_trace(str(path)))
            self._write(".txt", lambda path: path.write_text(table, encoding="utf-8"))
            if self._section.memory and cuda:
                self._write(".pickle", lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            logger.info("wrote %s", self._folder / f"{self._name}.*")
        except OSError as error:
            logger.warning("%s: not written (%s); training continues", self._folder / self._name, error.strerror)
        if self._section.memory and cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, suffix: str, write: Callable[[Path], Any]) -> None:
        with replacing(self._folder / f"{self._name}{suffix}") as temporary:
            write(temporary)


@contextlib.contextmanager
def layer_ranges(models: Sequence[torch.nn.Module], *, nvtx: bool) -> Iterator[None]:
    """Name every layer's forward pass, and that of its parts, in traces while the block runs. Local.

    Operations of the backward pass are found from those of the forward pass, which the trace connects; what recompute
    repeats has the name too.

    Args:
        models: model chunks of this rank.
        nvtx: also as ranges that Nsight Systems shows.
    """
    handles = []
    for model in models:
        for layer in unwrap(model).decoder.layers:
            named = [(f"layer {layer.layer_number - 1}", layer)]
            named += [(f"{named[0][0]} {part}", getattr(layer, part)) for part in PARTS]
            for name, module in named:
                handles += _range_hooks(name, module, nvtx=nvtx)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _range_hooks(name: str, module: torch.nn.Module, *, nvtx: bool) -> list[Any]:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        open_ranges.append(record_function(name).__enter__())

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)
        if nvtx:
            torch.cuda.nvtx.range_pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
