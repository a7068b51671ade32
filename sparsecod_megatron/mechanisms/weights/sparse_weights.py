"""Weights that are zero from the first step to the last: a random mask of exact counts, drawn by each matrix's name.

A dead weight is a zero in the parameter, so the forward pass is the dense one. Its gradient is masked before the norm,
so that its moments stay zero too, and neither AdamW nor weight decay ever moves it. Attention's and the MLPs' matrices
have masks; embeddings, output layer, norms, biases, routers and gates have none. The products stay dense: nothing is
saved in training.

A mask is kept where the optimizer's slice is (a byte for each weight, over all data-parallel ranks), and whole in
checkpoints, beside the weight that it belongs to, so that it is loaded under any layout and whatever `train.seed` says.

Source: Thangarasa et al., SPDF (arXiv 2303.10464); Liu et al., The Unreasonable Effectiveness of Random Pruning
(arXiv 2202.02643).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import choice, choices_of
from sparsecod_megatron.config.parameters import ParameterKind, ParameterTable
from sparsecod_megatron.mechanisms.weights.distribution import DISTRIBUTIONS
from sparsecod_megatron.seams.mechanism import Folds, Mechanism
from sparsecod_megatron.seams.plugin import STATE_PREFIX, Plugin, StepContext, StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.model.matrices import Shard

KINDS = ("qkv", "attention_output", "mlp_input", "mlp_output")
"""Matrices that can have masks, as `model.init_std` calls them; those of experts are MLPs' too."""


@dataclass
class SparseWeights(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "sparse_weights"

    density: float = field(default=0.5, metadata={"above": 0, "maximum": 1})
    """Share of weights that live, of all matrices with masks."""
    distribution: str = choice("uniform", "erk")
    """`uniform`: the same share in each matrix. `erk`: ∝ (rows + columns) / (rows · columns)."""
    kinds: list[str] = choices_of(*KINDS, among=KINDS)
    """Which matrices have masks."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Settings that would revive dead weights or hide them, and matrices without a live weight."""
        name = f"mechanisms.{self.name}"
        if config.optimizer.optimizer == "muon":
            yield f"optimizer.optimizer: muon, whose updates move every weight, with {name}; use adam"
        if config.precision.fp8_param_gather:
            yield f"precision.fp8_param_gather: true, but {name} holds weights at an exact zero; set it to false"
        if config.megatron.get("use_precision_aware_optimizer"):
            yield f"megatron.use_precision_aware_optimizer: true hides the fp32 weights from {name}; remove it"
        if not self.kinds:
            yield f"{self.key('kinds')}: names none; name at least one of {', '.join(KINDS)}, or remove the mechanism"
            return
        for row, count in self.live_counts(ParameterTable.of(config)).items():
            if count == 0:
                yield f"{self.key('density')}: {self.density} leaves no weight of {list(row)} alive; raise it"

    def has_mask(self, kind: ParameterKind) -> bool:
        """Whether parameters of a kind do; a gate is drawn as queries are, but is not one of them."""
        return kind.init in self.kinds and kind.fp8 and kind.name != "attention_gate"

    def live_counts(self, table: ParameterTable) -> dict[tuple[int, ...], int]:
        """Number of live weights in a matrix, by its whole shape."""
        shapes: Counter[tuple[int, ...]] = Counter()
        for row in self._rows(table):
            shapes[row.shape] += row.copies
        densities = DISTRIBUTIONS[self.distribution](list(shapes.items()), self.density)
        return {shape: round(share * math.prod(shape)) for shape, share in densities.items()}

    def dead_parameters(self, table: ParameterTable) -> int:
        """Number of weights that masks hold at zero."""
        live = self.live_counts(table)
        return sum(row.copies * (math.prod(row.shape) - live[row.shape]) for row in self._rows(table))

    def optimizer_bytes(self, kind: ParameterKind) -> int:
        """The mask."""
        return 1 if self.has_mask(kind) else 0

    def plugin(self, parts: StepParts) -> StaticMasks:
        """Holds the dead weights at zero."""
        return StaticMasks(self, parts)

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> LiveShare:
        """Share of weights with a mask that live."""
        assert isinstance(plugin, StaticMasks)
        return LiveShare(plugin)

    def export(self, model: ModelConfig) -> Folds:
        """The weights as they are: zeros are weights like others."""
        return Folds()

    def _rows(self, table: ParameterTable) -> list[ParameterKind]:
        layers = range(table.model.num_layers)
        return [row for layer in layers for row in table.layer(layer) if self.has_mask(row)]


@dataclass
class OwnedMask:
    """This process's slice of a mask.

    Attributes:
        shard: the matrix that it belongs to.
        master: fp32 weights of the slice.
        span: (start, end) of the slice in the flattened shard.
        dead: which of them are, [end − start].
    """

    shard: Shard
    master: Tensor
    span: tuple[int, int]
    dead: Tensor


class StaticMasks(Plugin):
    """Zeros that stay.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    name = SparseWeights.name

    def __init__(self, settings: SparseWeights, parts: StepParts) -> None:
        from sparsecod_megatron.model.matrices import matrices
        from sparsecod_megatron.parallel.owned_slices import held_slices, working_parts

        table = ParameterTable.of(parts.config)
        self._seed, self._counts, self._groups = parts.config.train.seed, settings.live_counts(table), parts.groups
        self._shards = [
            shard
            for model in parts.models
            for shard in matrices(model, table, parts.groups)
            if settings.has_mask(shard.row) and self._counts[shard.row.shape] < math.prod(shard.row.shape)
        ]
        shards = {shard.parameter: shard for shard in self._shards}
        self.owned = [
            OwnedMask(shards[parameter], master, span, self._drawn(shards[parameter]).view(-1)[slice(*span)].clone())
            for part in working_parts(parts.optimizer)
            for parameter, master, span in held_slices(part, parts.groups)
            if parameter in shards
        ]
        self._restored = False

    def weights_replaced(self) -> None:
        """Put the zeros into parameters and fp32 weights; those of a checkpoint with masks have them."""
        with torch.no_grad():
            for shard in [] if self._restored else self._shards:
                shard.parameter.masked_fill_(self._drawn(shard), 0.0)
            for mask in self.owned:
                mask.master.view(-1).masked_fill_(mask.dead, 0.0)

    @torch.no_grad()
    def on_gradients(self, context: StepContext) -> None:
        """A dead weight has no gradient."""
        for mask in self.owned:
            gradient: Tensor = mask.shard.parameter.main_grad  # type: ignore[attr-defined]
            gradient.view(-1)[slice(*mask.span)].masked_fill_(mask.dead, 0.0)

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Masks, cut as their weights are; 1 is dead."""
        from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map

        places = get_param_id_to_sharded_param_map(model_state, [shard.parameter for shard in self._shards])
        owned = {mask.shard.parameter: mask for mask in self.owned}
        state: dict[str, Any] = {}
        for index, shard in enumerate(self._shards):
            dead = torch.zeros(shard.parameter.numel(), dtype=torch.uint8, device=shard.parameter.device)
            if (mask := owned.get(shard.parameter)) is not None:
                dead[slice(*mask.span)] = mask.dead.to(torch.uint8)
            group = self._groups.expt_dp if shard.row.split == "expert" else self._groups.dp_cp
            torch.distributed.all_reduce(dead, torch.distributed.ReduceOp.MAX, group=group)
            place = places[index]
            dtype = {"dtype": torch.uint8} if hasattr(place, "dtype") else {}  # a factory's parts have it
            state[shard.matrix.name] = dataclasses.replace(
                place, key=f"{STATE_PREFIX}{self.name}.{place.key}", data=dead.view_as(shard.parameter), **dtype
            )
        return state

    def restore(self, tensors: dict[str, Any]) -> None:
        """The masks of a checkpoint, whatever was drawn."""
        self._restored = True
        for mask in self.owned:
            mask.dead = tensors[mask.shard.matrix.name].view(-1)[slice(*mask.span)].bool().to(mask.master.device)

    def _drawn(self, shard: Shard) -> Tensor:
        """This rank's part of a fresh mask, True where dead; drawn on the CPU, whose order is the same everywhere."""
        from sparsecod_megatron.model.matrices import named_generator

        shape = shard.whole_shape
        generator = named_generator(f"{self._seed} mask {shard.matrix.name}", torch.device("cpu"))
        order = torch.randperm(math.prod(shape), generator=generator)
        dead = torch.ones(math.prod(shape), dtype=torch.bool)
        dead[order[: self._counts[shard.row.shape]]] = False
        return shard.cut(dead.view(shape)).to(shard.parameter.device)


class LiveShare:
    """live_share: of the layer's weights that have a mask, the share that lives.

    Args:
        masks: of this process.
    """

    names: tuple[str, ...] = ("live_share",)
    maxima: tuple[str, ...] = ()

    def __init__(self, masks: StaticMasks) -> None:
        self._masks = masks

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Count what this process owns when the block ends. Local."""
        yield
        for mask in self._masks.owned:
            live = mask.dead.numel() - mask.dead.count_nonzero()
            sums.add(mask.shard.matrix.layer, "live_share", live, mask.dead.numel())

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none where it is dense."""
        return {"live_share": means["live_share"]} if "live_share" in means else {}
