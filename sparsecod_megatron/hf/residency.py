"""Where the weights of a model are: all of them in memory here, a block at a time in `streaming.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsecod_megatron.hf.shelf import Shelf
from sparsecod_megatron.parallel.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Residency:
    """A model whose weights are all in memory.

    Args:
        model: a causal LM.

    Attributes:
        is_whole: whether every weight can be looked at any time; otherwise `holding` and `in_turn` say when.
    """

    is_whole = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Have the block in memory that a module or parameter of this name is in, while the `with` block runs."""
        yield

    def in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """The names of parameters, each while it is in memory."""
        yield from names

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As the model's, each while it is in memory."""
        for name in self.in_turn([name for name, _ in self.model.named_parameters()]):
            yield name, self.model.get_parameter(name)

    def shelf(self) -> Shelf:
        """A place for tensors that grow with the sample."""
        return list[Tensor]()

    def begin(self, folder: Path | None, processes: Processes) -> None:
        """Before the first change.

        Args:
            folder: for changed blocks that leave memory; emptied. None where no block ever does.
            processes: those that make the same changes.
        """

    def changed(self, name: str) -> None:
        """Say that a parameter in memory has new values."""

    def save(self, folder: Path) -> None:
        """Write the model into an existing directory, as `save_pretrained` does."""
        self.model.save_pretrained(folder)
