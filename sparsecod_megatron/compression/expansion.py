"""Linear layers with a pruned copy for each cluster of their inputs, and how those are found: Sparse Expansion's parts.

A place is one or several linear layers that are given the same tensor, and so share their clusters. It is looked at in
two passes of its block: a sample of inputs, for k-means, then Σ x·xᵀ of each cluster over all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.compression.changes import zeros
from sparsecod_megatron.compression.clusters import Router, fit_router, shrunk
from sparsecod_megatron.compression.method import Material
from sparsecod_megatron.compression.neuron_distance import neuron_distance, spaced
from sparsecod_megatron.compression.patterns import Pattern
from sparsecod_megatron.compression.reconstruct import squared_outputs, sweep
from sparsecod_megatron.compression.statistics import InputStatistics
from sparsecod_megatron.compression.watching import Slot

SAMPLED_ROWS = 16384
"""Inputs of a place among which clusters are looked for, evenly spaced; all inputs are counted afterwards."""

_See = Callable[[Tensor], None]
"""What is done with inputs `[rows, in]`."""
_Copy = tuple[Tensor, tuple[float, float]]
"""New weights, and squared Frobenius norms of the change of the outputs and of the old outputs."""


@dataclass(frozen=True)
class Copies:
    """How layers are expanded.

    Attributes:
        clusters: copies of each.
        pattern: of zeros in every copy.
        shrinkage: as in `shrunk`.
        components: principal axes along which inputs are compared; None is 1/32 of the width, at least 16.
        damping: as in `sweep`.
        seed: of the clusters' beginnings.
    """

    clusters: int
    pattern: Pattern
    shrinkage: float
    components: int | None
    damping: float
    seed: int


class ExpertLinear(nn.Module):
    """A linear layer with a matrix for each cluster of its inputs: `[..., in]` → `[..., out]`.

    Args:
        in_features: channels that enter.
        out_features: channels that leave.
        clusters: matrices.
        bias: whether there is one, the same for all.
    """

    directions: Tensor
    offsets: Tensor

    def __init__(self, in_features: int, out_features: int, clusters: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(clusters, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        # Buffers: no gradient reaches a choice, and the report counts zeros among what was pruned.
        self.register_buffer("directions", torch.empty(clusters, in_features))
        self.register_buffer("offsets", torch.empty(clusters))

    def forward(self, x: Tensor) -> Tensor:
        """Each input by the matrix of its cluster."""
        rows = x.flatten(0, -2)
        labels = Router(self.directions, self.offsets).nearest(rows)
        output = x.new_empty(len(rows), self.out_features)
        for cluster in labels.unique().tolist():
            own = labels == cluster
            output[own] = nn.functional.linear(rows[own], self.weight[cluster], self.bias)
        return output.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Place:
    """Linear layers that are given the same tensor.

    Attributes:
        slots: their matrices.
        router: of the clusters, in the type of the weights.
        statistics: of each cluster's inputs.
        rows: some of the inputs, `[rows, in]`, by which neurons before and after are compared.
    """

    slots: list[Slot]
    router: Router
    statistics: list[InputStatistics]
    rows: Tensor

    @classmethod
    def unseen(cls, slots: list[Slot], router: Router, rows: Tensor) -> Place:
        """A place before any input was counted."""
        width, device = slots[0].weight.shape[1], slots[0].weight.device
        statistics = [InputStatistics.empty(width, gram=True, device=device) for _ in router.offsets]
        return cls(slots, router, statistics, rows)

    def count(self, rows: Tensor) -> None:
        """Count inputs `[rows, in]`, each for its cluster."""
        labels = self.router.nearest(rows)
        for cluster, statistics in enumerate(self.statistics):
            statistics.add(rows[labels == cluster])


class Expander:
    """Finds clusters, and puts pruned copies where one matrix was.

    Args:
        material: the model and its calibration sequences.
        copies: what is to be made.

    Attributes:
        clusters: number of copies, by the name of each layer exchanged so far.
        zeros: how many zeros a token meets in these layers.
    """

    def __init__(self, material: Material, copies: Copies) -> None:
        self._material, self._copies = material, copies
        self.clusters: dict[str, int] = {}
        self.zeros = 0.0
        self._few: list[str] = []

    def look(self, groups: list[list[Slot]], run: Callable[[Any], object]) -> list[Place]:
        """The places of a block that anything reaches. Collective.

        Args:
            groups: matrices that are given the same tensor.
            run: takes this process's sequences through the block as it is, each batch within the context that is given.
        """
        processes, places = self._material.processes, list[Place]()
        if not groups:
            return places
        samples = [_Sample(self._material) for _ in groups]
        run(partial(_seeing, groups, [sample.add for sample in samples]))
        for slots, sample in zip(groups, samples, strict=True):
            own = sample.rows(slots[0].weight)
            rows = torch.cat(processes.gather([own if processes.size == 1 else own.cpu()]))
            if len(rows):
                places.append(Place.unseen(slots, self._router(slots[0].weight, rows), spaced(rows)))
        run(partial(_seeing, [place.slots for place in places], [place.count for place in places]))
        totals = [[one.total(processes) for one in place.statistics] for place in places]
        return [replace(place, statistics=total) for place, total in zip(places, totals, strict=True)]

    def exchange(self, place: Place) -> None:
        """Put a pruned copy for each cluster where each matrix of a place was. Collective."""
        processes = self._material.processes
        used, few = shrunk(place.statistics, self._copies.shrinkage)
        self._few += [place.slots[0].name] * few
        for slot in place.slots:

            def work(part: Sequence[int], weight: Tensor = slot.weight) -> list[_Copy]:
                made = [self._pruned(weight, used[cluster], place.statistics[cluster]) for cluster in part]
                return made if processes.size == 1 else [(new.cpu(), outputs) for new, outputs in made]

            made = processes.distribute(range(len(used)), work)
            change, size = (sum(outputs[number] for _, outputs in made) for number in (0, 1))
            self.zeros += slot.weight.numel() * zeros([new for new, _ in made])
            module = _expert_linear(slot, place.router, [new for new, _ in made])
            error = math.sqrt(change / size) if size else None
            rows = place.rows.to(slot.weight)
            distance = neuron_distance(nn.functional.linear(rows, slot.weight, module.bias), module(rows))
            self._material.changes.exchange(
                slot.name, module, product=None, output_error=error, neuron_distance=distance
            )
            self.clusters[slot.name.removesuffix(".weight")] = len(made)

    def warnings(self) -> list[str]:
        """What a user should know of the clusters."""
        if not self._few:
            return []
        return [
            f"{len(self._few)} clusters had fewer inputs than a quarter of their width, and were pruned by those of "
            f"all clusters; the first of {self._few[0]}; more --samples or fewer clusters would help"
        ]

    def _router(self, weight: Tensor, rows: Tensor) -> Router:
        copies, width = self._copies, weight.shape[1]
        components = min(width, copies.components or max(16, width // 32))
        fit = partial(fit_router, rows, copies.clusters, components, copies.seed)
        router = self._material.processes.from_first(fit)
        # In the weights' type before anything is counted, so that the model routes as the calibration did.
        return Router(router.directions.to(weight), router.offsets.to(weight))

    def _pruned(self, weight: Tensor, used: InputStatistics, own: InputStatistics) -> _Copy:
        """A copy pruned by `used`, and squared norms of the outputs' change and of the outputs over `own`."""
        old, copies = weight.float(), self._copies
        new = sweep(old, used.hessian, copies.pattern, damping=copies.damping)[0].to(weight.dtype)
        assert own.gram is not None
        return new, squared_outputs(new, old, own.gram)


class _Sample:
    """Every nth of a place's inputs, counted over all sequences and processes, so that no batch size changes it."""

    def __init__(self, material: Material) -> None:
        assert material.sequences is not None
        count, length = material.sequences.shape
        self._stride = math.ceil(count * length / SAMPLED_ROWS)
        self._next = -material.processes.places(count).start * length % self._stride
        self._rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Look at inputs `[rows, in]`."""
        self._rows.append(rows[self._next :: self._stride].float())
        self._next = (self._next - len(rows)) % self._stride

    def rows(self, weight: Tensor) -> Tensor:
        """What was kept, float32 `[rows, in]`, none where nothing was seen."""
        return torch.cat([weight.new_zeros(0, weight.shape[1], dtype=torch.float32), *self._rows])


@contextlib.contextmanager
def _seeing(groups: Sequence[list[Slot]], sees: Sequence[_See]) -> Iterator[None]:
    """Show each place's inputs to a function of its own."""

    def show(see: _See, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0].flatten(0, -2))

    hooks = [
        slots[0].module.register_forward_pre_hook(partial(show, see)) for slots, see in zip(groups, sees, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _expert_linear(slot: Slot, router: Router, weights: Sequence[Tensor]) -> ExpertLinear:
    bias: nn.Parameter | None = slot.module.bias  # type: ignore[assignment]  # of a linear layer
    outputs, inputs = slot.weight.shape
    with torch.device("meta"):
        module = ExpertLinear(inputs, outputs, len(weights), bias=bias is not None)
    module.weight = nn.Parameter(torch.stack(list(weights)).to(slot.weight.device), requires_grad=False)
    module.bias = bias
    # Copies, because safetensors takes no tensor that two modules share.
    module.directions, module.offsets = router.directions.clone(), router.offsets.clone()
    return module
