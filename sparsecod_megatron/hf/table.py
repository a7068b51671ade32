"""One table of names, read in both directions, that leaves no tensor out and counts none twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.transforms import Shape, Transform

MAX_NAMES = 3
"""Tensor names listed in a message before it says how many more there are."""


@dataclass(frozen=True)
class Entry:
    """A group of Megatron tensors and the group of HuggingFace tensors that holds the same numbers.

    Args:
        megatron: names in a single-process, unsharded Megatron-Core `GPTModel`.
        hf: names in the HuggingFace files.
        transform: the layout change, with one shape for each name.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform

    def __post_init__(self) -> None:
        assert len(self.megatron) == len(self.transform.megatron_shapes), self
        assert len(self.hf) == len(self.transform.hf_shapes), self

    @property
    def megatron_items(self) -> list[tuple[str, Shape]]:
        """Names and shapes on Megatron's side."""
        return list(zip(self.megatron, self.transform.megatron_shapes, strict=True))

    @property
    def hf_items(self) -> list[tuple[str, Shape]]:
        """Names and shapes on HuggingFace's side."""
        return list(zip(self.hf, self.transform.hf_shapes, strict=True))


@dataclass(frozen=True)
class NameTable:
    """All entries of one model, in the order in which they are read and written.

    Args:
        architecture: the HuggingFace class, for messages.
        entries: the table.

    Raises:
        ConversionError: a name appears in two entries.
    """

    architecture: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for side in (self._megatron_names(), self._hf_names()):
            twice = [name for name, count in Counter(side).items() if count > 1]
            if twice:
                raise ConversionError(f"{self.architecture} table: {_listed(twice)} in several entries; keep one")

    @property
    def megatron_shapes(self) -> dict[str, Shape]:
        """Name to shape of every Megatron tensor, in table order."""
        return dict(item for entry in self.entries for item in entry.megatron_items)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name to shape of every HuggingFace tensor, in table order."""
        return dict(item for entry in self.entries for item in entry.hf_items)

    def to_hf(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Convert lazily, one entry at a time; a mapping that reads on access streams the whole model.

        Args:
            tensors: every Megatron tensor by name, none other; each is looked up once, in table order.

        Yields:
            HuggingFace names and tensors in table order, maybe views of the arguments.

        Raises:
            ConversionError: names missing or unknown (before anything is yielded), or a tensor of the wrong shape.
        """
        self._check_names(tensors, self._megatron_names(), "the training model")
        for entry in self.entries:
            group = [_of_shape(tensors, *item) for item in entry.megatron_items]
            yield from zip(entry.hf, entry.transform.to_hf(group), strict=True)

    def to_megatron(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `to_hf`, lazy in the same way.

        Args:
            tensors: every HuggingFace tensor by name, none other.

        Yields:
            Megatron names and tensors in table order, maybe views of the arguments.

        Raises:
            ConversionError: as `to_hf`; or a tensor holds what our model has no parameter for.
        """
        self._check_names(tensors, self._hf_names(), "the HuggingFace model")
        for entry in self.entries:
            group = [_of_shape(tensors, *item) for item in entry.hf_items]
            try:
                converted = entry.transform.to_megatron(group)
            except ConversionError as error:
                raise ConversionError(f"{_listed(entry.hf)}: {error}") from None
            yield from zip(entry.megatron, converted, strict=True)

    def _megatron_names(self) -> list[str]:
        return [name for entry in self.entries for name in entry.megatron]

    def _hf_names(self) -> list[str]:
        return [name for entry in self.entries for name in entry.hf]

    def _check_names(self, given: Iterable[str], expected: list[str], source: str) -> None:
        given_names, expected_names = set(given), set(expected)
        missing = [name for name in expected if name not in given_names]
        unknown = sorted(given_names - expected_names)
        if missing:
            raise ConversionError(
                f"{source} lacks {_listed(missing)}, which {self.architecture} needs; "
                "convert with the configuration of that model"
            )
        if unknown:
            raise ConversionError(
                f"{source} has {_listed(unknown)}, which {self.architecture} has no place for; "
                "convert with the configuration of that model"
            )


def _of_shape(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"{_located(name)}: shape {list(tensor.shape)}, but the model's configuration gives {list(shape)}; "
            "use the configuration that the tensor was made with"
        )
    return tensor


def _located(name: str) -> str:
    """`layer 3: decoder.layers.3.mlp.…`, so that the layer is seen at once."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return f"layer {found[1]}: {name}" if found else name


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(_located(name) for name in names[:MAX_NAMES]) + more
