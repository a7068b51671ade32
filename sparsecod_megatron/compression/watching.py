"""Statistics of what enters every matrix of a block, collected while calibration sequences run through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.changes import holder
from sparsecod_megatron.compression.experts import SeparateExperts, is_fused
from sparsecod_megatron.compression.statistics import InputStatistics, pooled
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.parallel.processes import Processes

ENOUGH_INPUTS = 0.25
"""Inputs per channel below which an expert takes the statistics of all experts in its place."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One matrix of a block.

    Attributes:
        name: of the parameter that holds it, in the model.
        expert: index in that parameter, of fused experts; None elsewhere.
        module: that multiplies by it in a pass.
        weight: `[out, in]`, a view of the parameter.
    """

    name: str
    expert: int | None
    module: nn.Module
    weight: Tensor

    @property
    def key(self) -> str:
        """The parameter's name, with the number of the expert."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def place(self) -> str:
        """The same for all experts of a layer."""
        *parents, leaf, parameter = self.name.split(".")
        return ".".join([*("*" if part.isdigit() else part for part in parents), leaf, parameter])


def slots_of(block: nn.Module, prefix: str, taken: set[str]) -> list[Slot]:
    """The matrices of a block whose fused experts are separate.

    Args:
        block: the module.
        prefix: its name in the model.
        taken: names of parameters to include.
    """
    found = []
    for path, module in block.named_modules():
        name = f"{prefix}.{path}.weight"
        if isinstance(module, SeparateExperts):
            for parameter, linears in ((module.entry_name, module.entries), ("down_proj", module.exits)):
                name = f"{prefix}.{path}.{parameter}"
                if name in taken:
                    found += [_expert(name, index, linear) for index, linear in enumerate(linears)]
        elif name in taken:
            weight = module.get_parameter("weight").detach()
            found.append(Slot(name, None, module, weight.T if isinstance(module, Conv1D) else weight))
    return found


def slots_of_parameter(model: nn.Module, name: str) -> list[Slot]:
    """The matrices of a parameter, of linear layers and of fused experts as they are."""
    module, weight = holder(model, name), model.get_parameter(name).detach()
    if is_fused(module):
        return [Slot(name, index, module, entry) for index, entry in enumerate(weight)]
    return [Slot(name, None, module, weight.T if isinstance(module, Conv1D) else weight)]


def _expert(name: str, index: int, linear: nn.Module) -> Slot:
    return Slot(name, index, linear, linear.get_parameter("weight").detach())


class Watcher:
    """Sums up the inputs of matrices, once for all matrices that are given the same tensor.

    Args:
        slots: matrices of a block.
        gram: whether Σ x·xᵀ is collected.
    """

    def __init__(self, slots: Sequence[Slot], *, gram: bool) -> None:
        self._slots, self._gram = slots, gram
        self._owners: dict[str, str] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._current: dict[int, tuple[Tensor, str]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what enters the matrices in this one pass of the block."""
        hooks = [
            slot.module.register_forward_pre_hook(partial(self._see, slot.key), with_kwargs=True)
            for slot in self._slots
        ]
        try:
            yield
        finally:
            self._current.clear()
            for hook in hooks:
                hook.remove()

    def _see(self, key: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        _, giver = self._current.get(id(inputs), (None, None))
        owner = self._owners.setdefault(key, giver or key)
        if owner != key:
            if giver != owner:
                raise ConversionError(f"{key}: is given the tensor of {owner} in one pass and another in the next")
            return
        # The tensor is held until the pass ends, so that no other takes its id.
        self._current[id(inputs)] = (inputs, key)
        if key not in self._statistics:
            width, device = inputs.shape[-1], inputs.device
            self._statistics[key] = InputStatistics.empty(width, gram=self._gram, device=device)
        self._statistics[key].add(inputs)

    def totals(self, processes: Processes) -> dict[str, InputStatistics]:
        """Statistics of all processes together by a matrix's key, in the order of the block's calls. Collective.

        A matrix that nobody gave an input is not among them.
        """
        owners: dict[str, str] = {}
        for theirs in processes.gather([self._owners]):
            owners = {**owners, **{key: owner for key, owner in theirs.items() if key not in owners}}
        slots = {slot.key: slot for slot in self._slots}
        sums: dict[str, InputStatistics] = {}
        for owner in dict.fromkeys(owners.values()):
            weight = slots[owner].weight
            own = self._statistics.get(self._owners.get(owner, owner))
            own = own or InputStatistics.empty(weight.shape[1], gram=self._gram, device=weight.device)
            sums[owner] = own.total(processes)
        return {key: sums[owner] for key, owner in owners.items()}


def stages_of(slots: Sequence[Slot], found: dict[str, InputStatistics]) -> list[list[Slot]]:
    """Matrices whose inputs can be known together, in the order of the block's calls: `[q, k, v], [o], …`.

    Experts in one place are together; what no input reached comes last.
    """
    owner_of_place: dict[str, int] = {}
    places = {slot.key: slot.place for slot in slots}
    for key, statistics in found.items():
        first = owner_of_place.setdefault(places[key], id(statistics))
        for place in {places[other] for other, theirs in found.items() if theirs is statistics}:
            owner_of_place.setdefault(place, first)
    stages: dict[int, list[Slot]] = {stage: [] for stage in owner_of_place.values()}
    for slot in slots:
        stages.setdefault(owner_of_place.get(slot.place, -1), []).append(slot)
    return list(stages.values())


class Given:
    """What enters each matrix of a block: its own inputs, or those of all experts in its place, for lack of its own.

    Args:
        slots: matrices of the block.
        found: statistics by a matrix's key, as of `Watcher.totals`; emptied by `keep_for`.
    """

    def __init__(self, slots: Sequence[Slot], found: dict[str, InputStatistics]) -> None:
        self._places = {slot.key: slot.place for slot in slots}
        self._found = found
        self._pooled: dict[str, InputStatistics] = {}

    def to(self, slot: Slot) -> tuple[InputStatistics | None, bool]:
        """What a matrix is pruned by, and whether it is pooled over the experts in its place."""
        own, width, place = self._found.get(slot.key), slot.weight.shape[1], slot.place
        if own is not None and own.count >= ENOUGH_INPUTS * width:
            return own, False
        fellows = [self._found[key] for key, other in self._places.items() if other == place and key in self._found]
        if len({id(entry) for entry in fellows} - {id(own)}) == 0:
            return own, False
        if place not in self._pooled:
            self._pooled[place] = pooled(fellows)
        return self._pooled[place], True

    def keep_for(self, slots: Sequence[Slot]) -> None:
        """Let go of what none of these matrices asks for."""
        places = {slot.place for slot in slots}
        for key in [key for key in self._found if self._places[key] not in places]:
            del self._found[key]
        self._pooled = {place: entry for place, entry in self._pooled.items() if place in places}
