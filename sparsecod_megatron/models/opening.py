"""The one way to a model for whoever measures or changes it: a run, a step, a HuggingFace or a compressed directory.

A checkpoint is exported into a temporary directory, with the same comparison as `sparsecod export`. A directory that
`sparsecod compress` wrote computes what was measured when it was written.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.compression.compress import restore, sidecar_of
from sparsecod_megatron.errors import CheckpointError, ConversionError
from sparsecod_megatron.files import MODEL_CONFIG_FILE
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.models.loading import load_model, load_tokenizer, stream_model, usable_device
from sparsecod_megatron.parallel.processes import Processes

logger = logging.getLogger("sparsecod")


class Opened:
    """A model in evaluation mode with its tokenizer, until it is closed.

    The weights are loaded when `model` is first asked for: several models can be opened, and any of them refused,
    before the first is in memory, and closing each before the next is asked for keeps one there.

    Attributes:
        directory: the HuggingFace directory, which a checkpoint has while it is open.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        load: Callable[[], Residency],
        processes: Processes,
        export: contextlib.ExitStack,
    ) -> None:
        self.directory, self._tokenizer = directory, tokenizer
        self._load, self._processes, self._export = load, processes, export
        self._residency: Residency | None = None
        self._is_open = True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        assert self._tokenizer is not None, "asked for the tokenizer of a model that was opened without one"
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM on its device; loaded on the first call.

        Raises:
            CheckpointError: weights that cannot be read, or lack tensors.
            ConfigError: what a compressed directory needs is not installed.
        """
        return self.residency.model

    @property
    def residency(self) -> Residency:
        """The same, with where its weights are.

        Raises:
            CheckpointError: as `model`.
            ConfigError: as `model`.
            ConversionError: a model whose blocks cannot be read one at a time, where it was opened for that.
        """
        assert self._is_open, "asked for the model after it was closed"
        if self._residency is None:
            self._residency = self._load()
        return self._residency

    def close(self) -> None:
        """Let model and export go, once every process has come here. Collective over the processes; repeatable."""
        if self._is_open:
            self._processes.wait()
            self._leave()

    def _leave(self) -> None:
        self._is_open, self._residency = False, None
        gc.collect()  # models are full of cycles, and the next one needs the memory
        self._export.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # other processes may not come
            self._leave()


def open_model(
    path: Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    verify: bool = True,
    restored: bool = True,
    reads_text: bool = True,
    streams: Path | None = None,
    processes: Processes | None = None,
) -> Opened:
    """Find a model, make it a HuggingFace directory where it is not one, and read its tokenizer. Collective.

    Args:
        path: a training run, one of its step directories, a HuggingFace directory, or one of `sparsecod compress`.
        dtype: `float32` or `bfloat16`, of weights and computation.
        device: `cpu` or `cuda`; None is cuda where there is one.
        verify: compare a checkpoint's export with Megatron-Core's logits.
        restored: compute what was measured when a directory was compressed, also where that is more than the weights:
            a quantised model rounds what enters its layers. Without it the model keeps its derivatives, and a warning
            says what it lacks.
        reads_text: whether the tokenizer is needed; a model without one is refused before its weights are loaded.
        streams: a folder on the disk, to have a block in memory only while it is needed, and little else; None loads
            the whole model.
        processes: those that open it together; the first exports, for all of them. None is this one alone.

    Raises:
        CheckpointError: neither a model nor a checkpoint, or no tokenizer.
        ConversionError: a checkpoint that HuggingFace cannot express, or whose files compute something else.
        ConfigError: `cuda` on a machine without it.
    """
    processes = processes or Processes()
    device = usable_device(device)
    with contextlib.ExitStack() as export:
        directory = processes.from_first(lambda: export.enter_context(_huggingface_directory(path, verify=verify)))
        tokenizer = load_tokenizer(directory) if reads_text else None
        load = partial(_load, directory, dtype=dtype, device=device, restored=restored, streams=streams)
        return Opened(directory, tokenizer, load, processes, export.pop_all())


def _load(directory: Path, *, dtype: str, device: str, restored: bool, streams: Path | None) -> Residency:
    if streams is not None:
        residency = stream_model(directory, dtype=dtype, device=device, scratch=streams)
    else:
        residency = Residency(load_model(directory, dtype=dtype, device=device))
    sidecar = sidecar_of(directory)
    if sidecar is not None and restored:
        restore(residency.model, sidecar)
    elif sidecar is not None:
        logger.warning("%s: its weights alone, without %s, which `sparsecod eval` applies", directory, sidecar.name)
    return residency


@contextlib.contextmanager
def _huggingface_directory(path: Path, *, verify: bool) -> Iterator[Path]:
    """The model as a HuggingFace directory while the block runs."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a HuggingFace model directory or a training run")
    if (path / MODEL_CONFIG_FILE).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sparsecod-") as folder:
        output = Path(folder) / "hf"
        if verify and ("RANK" in os.environ or dist.is_initialized()):
            _export_apart(path, output)
        else:
            from sparsecod_megatron.backend import select_backend

            select_backend()
            from sparsecod_megatron.checkpoint.exported import export_checkpoint

            export_checkpoint(path, output, verify=verify)
        yield output


def _export_apart(path: Path, output: Path) -> None:
    """In a process of its own: the comparison builds the model in a process group of one, and this process has others.

    Raises:
        ConversionError: as its line says.
    """
    command = [sys.executable, "-m", "sparsecod_megatron", "export", f"--checkpoint={path}", f"--output={output}"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConversionError(words.removeprefix("sparsecod export: "))
