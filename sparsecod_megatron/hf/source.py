"""A HuggingFace directory as our model: its configuration in our keys, and its weights under our names, read lazily."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families import FAMILIES, Family, exported_modules, family_of
from sparsecod_megatron.hf.families.read import model_config
from sparsecod_megatron.seams.mechanism import Mechanism

INDEX_FILE, SINGLE_FILE, ADAPTER_FILE = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FREQUENCY_SUFFIX = ".rotary_emb.inv_freq"
"""End of tensors that old files hold although the configuration says all about them."""
FREQUENCY_TOLERANCE = 2.0**-7
"""Relative: half-precision files have rounded them."""


@dataclass(frozen=True)
class HFSource:
    """A model directory, read but for its weights.

    Attributes:
        directory: where it lies.
        model: its configuration in our keys, `vocab_size` set.
        family: whose name table its files follow.
        seq_length: longest sequence, in tokens.
        mechanisms: settings of each, by name.
        files: its tensors under HuggingFace's names, each read when it is asked for.
    """

    directory: Path
    model: ModelConfig
    family: Family
    seq_length: int
    mechanisms: dict[str, Any]
    files: SafetensorsFiles

    def tensors(self, mechanisms: Sequence[Mechanism] = ()) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors in table order, one entry in memory at a time.

        Args:
            mechanisms: what `self.mechanisms` are the settings of.

        Raises:
            ConversionError: tensors missing, unknown, misshapen, unreadable or non-finite; or values that ours has no
                place for.
        """
        modules = exported_modules(self.model, mechanisms)
        own = [tensor for module in modules.values() for tensor in module.tensors]
        self.files.integers |= {tensor.hf for tensor in own if tensor.is_integer}
        yield from self.family.table(self.model, modules).to_megatron(self.files)


def open_source(directory: Path) -> HFSource:
    """Read a directory's configuration and find its weights. Local.

    Args:
        directory: with `config.json` and safetensors.

    Raises:
        ConversionError: no such directory, an unreadable or unknown configuration, a feature that ours has not, or
            weight files that are missing or damaged.
    """
    config, path = read_config(directory), directory / "config.json"
    family = family_of(config)
    if family is None:
        known = ", ".join(family.architecture for family in FAMILIES)
        raise ConversionError(f"{path}: model_type {config.model_type!r} has no name table; models of {known} import")
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ConversionError(f"{path}: quantization_config is {method!r}; dequantise the model first")
    try:
        model = model_config(config, family, where=path)
    except ConversionError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConversionError(f"{path}: holds what no model can have ({reason}); get the file again") from error
    files = SafetensorsFiles(directory)
    embedding, head = family.named(EMBEDDING), family.named(HEAD)
    if not model.untie_embeddings_and_output_weights and {head, embedding} <= files.keys():
        # As transformers does: it ties only where the files hold nothing else (PreTrainedModel.tie_weights).
        if torch.equal(files[head], files[embedding]):
            files.leave_out(head)
        else:
            model = replace(model, untie_embeddings_and_output_weights=True)
    _leave_out_derived(files, config, family)
    model = family.without_placeholders(model, files)
    settings = getattr(config, "mechanisms", {}) if family.extensible else {}
    return HFSource(directory, model, family, int(config.max_position_embeddings), settings, files)


def _leave_out_derived(files: SafetensorsFiles, config: PreTrainedConfig, family: Family) -> None:
    """Leave out what transformers does not read: rotary frequencies, and what the family knows of old files.

    Raises:
        ConversionError: they are others, so what the model was trained with is not what transformers computes.
    """
    for name in list(files):
        is_known = next((holds for end, holds in family.derived.items() if name.endswith(end)), None)
        if is_known is not None:
            if not is_known(files.stored(name)):
                raise ConversionError(
                    f"{files.directory}: {name} holds something else than {family.architecture} computes, and "
                    "transformers does not read it; remove the tensor if the model was trained without"
                )
            files.leave_out(name)
    for name in [name for name in files if name.endswith(FREQUENCY_SUFFIX)]:
        held = files[name].double()
        base = float(config.rope_parameters["rope_theta"])
        expected = base ** -(torch.arange(held.numel(), dtype=torch.float64) / max(held.numel(), 1))
        if not torch.allclose(held.flatten(), expected, rtol=FREQUENCY_TOLERANCE, atol=0):
            raise ConversionError(
                f"{files.directory}: {name} holds other frequencies than rope_theta {base:g} gives, and transformers "
                "does not read them; correct rope_theta, or remove the tensor"
            )
        files.leave_out(name)


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, by name.

    Args:
        directory: their folder.

    Attributes:
        integers: names of tensors that hold integers, int32; all others hold floating-point numbers.

    Raises:
        ConversionError: files missing, damaged, or not those that the index lists.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.integers: set[str] = set()
        self._files = _weight_map(directory)

    @property
    def paths(self) -> list[Path]:
        """The files, in the order of their names."""
        return [self.directory / name for name in sorted(set(self._files.values()))]

    def leave_out(self, name: str) -> None:
        """Drop a tensor that has been shown to repeat another, if it is there."""
        self._files.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in the type of the file.

        Raises:
            ConversionError: unreadable, not floating-point numbers, or non-finite.
        """
        path, tensor = self.directory / self._files[name], self.stored(name)
        if name in self.integers and tensor.dtype == torch.int32:
            return tensor
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ConversionError(f"{path}: {name} is of type {tensor.dtype}; dequantise the model first")
        if not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{path}: {name} holds NaN or infinity, so the file is damaged; get it again")
        return tensor

    def stored(self, name: str) -> Tensor:
        """A tensor of whatever type and values."""
        with _opened(self.directory / self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors by name that are read when they are sliced, as long as the `with` block runs."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        with ExitStack() as stack:
            files = {filename: stack.enter_context(_opened(self.directory / filename)) for filename in by_file}
            yield {name: files[filename].get_slice(name) for filename, held in by_file.items() for name in held}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_config(directory: Path) -> PreTrainedConfig:
    """A directory's configuration, without anybody's code.

    Raises:
        ConversionError: none, or one that transformers cannot read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ConversionError(f"{directory}: has no config.json; give a HuggingFace model directory")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # readers of many models raise what they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(f"{path}: transformers cannot read it ({reason}); get the file again") from error


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to file name, as the files' own headers say: all of each file that transformers would choose.

    Source: transformers 5.24 modeling_utils.py, `_get_resolved_checkpoint_files`: the single file before the index.
    """
    adapter = directory / ADAPTER_FILE
    if adapter.is_file():
        raise ConversionError(f"{adapter}: transformers adds this adapter to the weights; merge it into them first")
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return dict.fromkeys(_names(directory / SINGLE_FILE), SINGLE_FILE)
    if not index.is_file():
        raise ConversionError(
            f"{directory}: has no {SINGLE_FILE}; only safetensors are read here, save the model in that format"
        )
    try:
        listed: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        strange = [name for name in listed.values() if name != Path(name).name or not name.isprintable()]
        unnamed = [name for name in listed if not name.isprintable()]
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: damaged ({type(error).__name__}: {error}); get the file again") from None
    if strange:
        raise ConversionError(f"{index}: lists {strange[0]!r}, which is not a file name; get the file again")
    if unnamed:
        raise ConversionError(f"{index}: lists {unnamed[0]!r}, which is not a tensor's name; get the file again")
    held = [(name, filename) for filename in dict.fromkeys(listed.values()) for name in _names(directory / filename)]
    pairs = set(held)
    for name, filename in listed.items():
        if (name, filename) not in pairs:
            raise ConversionError(f"{directory / filename}: lacks {name}, which {INDEX_FILE} lists; get the file again")
    found = dict(held)
    for name, filename in held:
        if found[name] != filename:
            raise ConversionError(
                f"{directory}: {filename} and {found[name]} both hold {name}; get the files again, they do not belong "
                "together"
            )
    return found


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ConversionError(f"{path}: no such file, but the index lists it; get the missing shard")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: damaged ({' '.join(str(error).split())}); get the file again") from None
