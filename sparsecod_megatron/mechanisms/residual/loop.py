"""A loop: layers that are applied several times in a row, with one set of parameters (looped, universal transformer).

    x ← (f_last ∘ … ∘ f_first)^times (x),   then the other layers

`model.num_layers` counts layers as they are applied, so depth means what it means in any model: learning rates, initial
values, windows and norms by depth, FLOPs, activations and statistics are those of a model of that many layers, and
parameters, gradients and optimizer are those of the distinct ones. Layer first + i · block + b is block b in iteration
i. Buffers, such as the selection bias of experts, are of each iteration.

A checkpoint names weights by layer, those of later iterations as copies, and an export is the plain model with copies:
the same function in every class that has the layers. There it is not a loop any more, and trains as a plain model.
Nothing is added to the stream between iterations (no input injection).

Source: Dehghani et al., Universal Transformers (arXiv 1807.03819), without its halting and position signals; Saunshi et
al., Reasoning with Latent Thoughts (arXiv 2502.17416), both from memory; use of depth: arXiv 2602.16490.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.config.megatron_fields import STAGE_FIELDS
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.seams.mechanism import Folds, Mechanism

if TYPE_CHECKING:
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.metrics.group import Statistics
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class Loop(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "loop"
    shapes_weights: ClassVar[bool] = True

    first: int = at_least(0, 0)
    """First layer (from 0) of the block that is repeated."""
    last: int = at_least(0, 0)
    """Its last layer."""
    times: int = at_least(1, 2)
    """How often it is applied."""

    @property
    def block(self) -> int:
        """Number of distinct layers that are repeated."""
        return self.last - self.first + 1

    @property
    def end(self) -> int:
        """The layer (from 0) behind the last iteration."""
        return self.first + self.block * self.times

    def place(self, layer: int) -> tuple[int, int] | None:
        """(iteration, layer of the block), both from 0, of a layer (from 0); None outside of the loop."""
        return divmod(layer - self.first, self.block) if self.first <= layer < self.end else None

    def owner(self, model: ModelConfig, layer: int) -> int:
        """The layer of the first iteration."""
        place = self.place(layer)
        return layer if place is None else self.first + place[1]

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A block that is none or does not fit, stages that divide it, layers of another sort, and who cannot share."""
        layers = config.model.num_layers
        if self.last < self.first:
            yield f"{self.key('last')}: {self.last} is before {self.key('first')}={self.first}; raise it"
            return
        if self.end > layers:
            yield (
                f"mechanisms.{self.name}: layers {self.first} … {self.last}, applied {self.times} times, end with "
                f"layer {self.end - 1}, but model.num_layers={layers}, which counts every application; raise it to "
                f"{self.end}"
            )
            return
        if self.times == 1:
            return
        yield from self._stage_problems(config)
        table = ParameterTable.of(config)
        others = (layer for layer in range(self.first, self.end) if self._other_sort(table, layer))
        for layer in others:
            yield (
                f"mechanisms.{self.name}: layer {layer} has other parameters than layer "
                f"{self.owner(config.model, layer)}, whose it should share; make both alike, or move the loop"
            )
            return
        if config.precision.fp8_param_gather:
            why = f"FP8 weights that layers of mechanisms.{self.name} share have scales of one of them"
            yield f"precision.fp8_param_gather: true, but {why}; set it to false"
        for other in config.mechanisms.values():
            if other is not self and not other.shares_layers:
                why = f"mechanisms.{other.name} is of layers that share nothing"
                yield f"mechanisms.{self.name}: {why}; remove one of both"

    def _stage_problems(self, config: RunConfig) -> Iterator[str]:
        parallel = config.parallel
        stages = parallel.pipeline_model_parallel_size
        chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
        uneven = [field for field in STAGE_FIELDS if config.megatron.get(field)]
        if stages > 1 and uneven:
            yield (
                f"megatron.{uneven[0]}: {config.megatron[uneven[0]]!r}, but mechanisms.{self.name} has to lie in one "
                "stage, which is known of even ones alone; remove it"
            )
        elif (size := config.model.num_layers // chunks) and self.first // size != (self.end - 1) // size:
            yield (
                f"parallel.pipeline_model_parallel_size: {stages}, but its stages of {size} layers divide layers "
                f"{self.first} … {self.end - 1} of mechanisms.{self.name}, which share parameters; move the loop or "
                "lower it"
            )

    def _other_sort(self, table: ParameterTable, layer: int) -> bool:
        ours, theirs = (
            [(kind.pattern, kind.shape, kind.copies) for kind in table.layer(index)]
            for index in (layer, self.owner(table.model, layer))
        )
        return ours != theirs

    def layers_differ(self, model: ModelConfig) -> bool:
        """Layers of later iterations have no state of the optimizer, so that it cannot be stacked."""
        return self.times > 1

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Loop:
        """A layer of the second half, twice, which two stages do not divide."""
        first = small.num_layers // 2
        return replace(self, first=first, last=first, times=min(self.times, 2))

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> LoopPlaces:
        """What the layers of the other statistics are."""
        return LoopPlaces(self, models)

    def export(self, model: ModelConfig) -> Folds:
        """Layers with copies of the weights."""
        return Folds()


class LoopPlaces:
    """loop_iteration and loop_block of each layer in the loop, by which its other statistics can be told apart.

    Args:
        loop: its settings.
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("loop_iteration", "loop_block")
    maxima: tuple[str, ...] = ()

    def __init__(self, loop: Loop, models: Sequence[Any]) -> None:
        import torch

        layers = [layer.layer_number - 1 for model in models for layer in model.decoder.layers]
        places = {layer: place for layer in layers if (place := loop.place(layer)) is not None}
        device = next(models[0].parameters()).device
        self._places = {layer: torch.tensor(place, device=device) for layer, place in places.items()}

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """The same in every step. Local."""
        for layer, place in self._places.items():
            sums.add_many(layer, self.names, place, 1)
        yield

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's; nothing outside of the loop."""
        return {name: means[name] for name in self.names if name in means}
