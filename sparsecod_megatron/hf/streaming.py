"""A model whose blocks come from their safetensors one at a time: in memory are embeddings, head, and one block.

It is built without weights. A member of one of its outermost lists of modules is read when it is called, or while
somebody holds it, and leaves when that ends; if it was changed, it is written to a file first, and read from there ever
after. transformers' own loader reads and its own writer's functions write, so names, fused experts and number formats
are those of a model that is loaded and saved as a whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sparsecod_megatron.errors import CheckpointError, ConversionError
from sparsecod_megatron.files import making
from sparsecod_megatron.hf.expert_modules import avoid_unaligned_products
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.hf.shelf import OnDisk
from sparsecod_megatron.hf.source import INDEX_FILE, SINGLE_FILE, SafetensorsFiles, read_config
from sparsecod_megatron.parallel.processes import Processes

_ADVICE = "leave --stream out"
_ONE_FILE = 10**18
"""Bytes that no model has."""


@dataclass(eq=False)
class _Unit:
    """What is in memory together.

    Attributes:
        module: the block.
        empty: its tensors by their names in the model, without values, which take their places while it is away.
        files: where its tensors are.
        stored: their names there.
        holders: how many want it in memory.
        is_changed: since it was read.
    """

    module: nn.Module
    empty: dict[str, Tensor]
    files: SafetensorsFiles
    stored: list[str] = field(default_factory=list)
    holders: int = 0
    is_changed: bool = False


class Streamed(Residency):
    """A model directory whose blocks are read when they are needed.

    Args:
        directory: with `config.json` and safetensors.
        dtype: of weights and computation.
        device: where it computes.
        scratch: folder on the disk for what else is not to be in memory; nothing stays there.

    Raises:
        ConversionError: files other than safetensors, or a model that cannot be taken apart like this.
        CheckpointError: tensors that the model needs and the files lack.
    """

    is_whole = False

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: str, scratch: Path) -> None:
        super().__init__(_without_weights(directory, dtype))
        self._scratch = scratch
        self._folder: Path | None = None
        self._processes = Processes()
        files, model = SafetensorsFiles(directory), self.model
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        self._lists = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
        self._conversion = get_model_conversion_mapping(model)
        self._loading = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=self._conversion,
        )
        self._units: dict[str, _Unit] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if (name := self._unit_of(key)) is not None:
                self._units.setdefault(name, _Unit(model.get_submodule(name), {}, files)).empty[key] = tensor
        self._refuse_shared()
        self._read_rest(files, device)
        for unit in self._units.values():
            unit.module.register_forward_pre_hook(partial(self._before, unit), prepend=True)
            unit.module.register_forward_hook(partial(self._after, unit), prepend=True, always_call=True)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """As of a whole model; what is held several times leaves when the last holder ends."""
        unit = self._units.get(self._unit_of(name) or "")
        if unit is None:
            yield
            return
        try:
            self._take(unit)
            yield
        except BaseException:
            # Half a change is none, and other processes may not come to write it.
            unit.is_changed = False
            raise
        finally:
            self._leave(unit)

    def in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """As of a whole model; a block comes once for consecutive names."""
        for _, group in groupby(names, key=self._unit_of):
            together = list(group)
            with self.holding(together[0]):
                yield from together

    def shelf(self) -> OnDisk:
        """As of a whole model, on the disk."""
        return OnDisk(self._scratch)

    def begin(self, folder: Path | None, processes: Processes) -> None:
        """As of a whole model, but a folder must be given. Collective over the processes."""
        assert folder is not None, "changed blocks need a place"
        self._folder, self._processes = folder, processes
        if processes.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        processes.wait()

    def changed(self, name: str) -> None:
        """As of a whole model; its block is written when it leaves."""
        unit = self._units.get(self._unit_of(name) or "")
        if unit is not None:
            assert unit.holders, f"{name} was changed while it was away"
            unit.is_changed = True

    def save(self, folder: Path) -> None:
        """As of a whole model, with a file for each block."""
        model, resident = self.model, self.model.state_dict()
        for unit in self._units.values():
            for key in unit.empty:
                del resident[key]
        model.save_pretrained(folder, state_dict=resident, max_shard_size=_ONE_FILE)
        count = len(self._units) + 1
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        (folder / SINGLE_FILE).rename(folder / names[0])
        for filename, (name, unit) in zip(names[1:], self._units.items(), strict=True):
            if unit.files.directory == self._place(name):
                # The changed block as it is, without another copy on the disk.
                (folder / filename).hardlink_to(unit.files.directory / SINGLE_FILE)
            else:
                with self.holding(name):
                    self._write(unit, folder / filename)
        _write_index(folder, names, model.num_parameters())

    def _unit_of(self, name: str) -> str | None:
        """The name of the unit that holds a module, parameter or buffer of this name."""
        for outer in self._lists:
            rest = name.removeprefix(f"{outer}.")
            if rest != name:
                return f"{outer}.{rest.partition('.')[0]}"
        return None

    def _refuse_shared(self) -> None:
        tied = self.model.all_tied_weights_keys
        for name in (*tied.keys(), *tied.values()):
            if self._unit_of(name) is not None:
                raise ConversionError(
                    f"--stream: {name} is tied to another weight, so its block is not on its own; {_ADVICE}"
                )

    def _read_rest(self, files: SafetensorsFiles, device: str) -> None:
        """Find what belongs to which unit, and read what belongs to none."""
        model, known = self.model, self.model.state_dict()
        renamings = [entry for entry in self._conversion if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversion if isinstance(entry, WeightConverter)]
        rest: list[str] = []
        for stored in files:
            prefix = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": known}
            name, _ = rename_source_key(stored, renamings, converters, **prefix)
            if name not in known:  # as transformers does: what has its name already keeps it
                name, _ = rename_source_key(stored, [], [], **prefix)
            unit = self._units.get(self._unit_of(name) or "")
            (rest if unit is None else unit.stored).append(stored)
        missing = self._load(files, rest)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        _refuse_missing(files.directory, {name for name in missing if self._unit_of(name) is None})
        for name, buffer in list(model.named_non_persistent_buffers()):
            _put(model, name, torch.empty_like(buffer, device=device))
        model.initialize_weights()  # fills these buffers, and passes over what was loaded or has no values

    def _load(self, files: SafetensorsFiles, stored: Iterable[str]) -> set[str]:
        """Read tensors into the model.

        Returns:
            Names of all the model's tensors that were not among them.
        """
        with files.slices(stored) as slices, _without_progress_bars():
            found, _ = convert_and_load_state_dict_in_model(self.model, slices, self._loading)
        wrong = [name for name, *_ in found.mismatched_keys] or list(found.conversion_errors)
        if wrong:
            raise CheckpointError(
                f"{files.directory}: {wrong[0]} does not have the shape that config.json gives it; get the files again"
            )
        return found.missing_keys

    def _before(self, unit: _Unit, *_: Any) -> None:
        self._take(unit)

    def _after(self, unit: _Unit, *_: Any) -> None:
        self._leave(unit)

    def _take(self, unit: _Unit) -> None:
        unit.holders += 1
        if unit.holders == 1:
            _refuse_missing(unit.files.directory, self._load(unit.files, unit.stored) & unit.empty.keys())

    def _leave(self, unit: _Unit) -> None:
        unit.holders -= 1
        if unit.holders:
            return
        if unit.is_changed:
            self._keep(unit)
        for name, tensor in unit.empty.items():
            _put(self.model, name, tensor)

    def _keep(self, unit: _Unit) -> None:
        """Write a changed unit, which is read from there from now on. Collective over the processes."""
        name = next(name for name, other in self._units.items() if other is unit)
        place = self._place(name)
        assert place is not None, "`begin` comes before the first change"
        if self._processes.is_first:
            with making(place) as folder:
                self._write(unit, folder / SINGLE_FILE)
        self._processes.wait()
        unit.files, unit.is_changed = SafetensorsFiles(place), False
        unit.stored = list(unit.files)

    def _place(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / name

    def _write(self, unit: _Unit, path: Path) -> None:
        ignored = self.model._keys_to_ignore_on_save or ()
        held = self.model.state_dict()
        tensors = {name: held[name] for name in unit.empty if name not in ignored}
        stored = revert_weight_conversion(self.model, tensors)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path, metadata={"format": "pt"})


def _without_weights(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory with tensors that have a shape alone, in evaluation mode."""
    config = read_config(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"--stream: {directory} holds quantised weights, which are read as a whole; {_ADVICE}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a model's own code raises what it likes
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(
            f"--stream: {directory}: cannot be built before its weights are read ({type(error).__name__}: {reason}); "
            f"{_ADVICE}"
        ) from error
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    avoid_unaligned_products(model)
    return model.eval()


def _refuse_missing(directory: Path, missing: Iterable[str]) -> None:
    if names := sorted(missing):
        raise CheckpointError(
            f"{directory}: the weight files lack {len(names)} tensors, the first {names[0]}; export it again"
        )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer in its place."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws one whenever tensors are read."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _write_index(folder: Path, filenames: Iterable[str], num_parameters: int) -> None:
    """Say which file holds what, as transformers' own writer does."""
    weight_map: dict[str, str] = {}
    size = 0
    for filename in filenames:
        with (folder / filename).open("rb") as file:
            header: Mapping[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        weight_map |= dict.fromkeys(tensors, filename)
        size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values())
    content = {"metadata": {"total_parameters": num_parameters, "total_size": size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
