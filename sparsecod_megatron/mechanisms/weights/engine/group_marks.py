"""Marks of whole groups: settings and plugin that the structured methods share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import choice
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.groups import PATTERN_KINDS, Groups, model_blocks, smallest_groups
from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.mechanism import latent_conflict
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class GroupMechanism(WeightMechanism):
    """A method over neurons or head groups.

    Attributes:
        kinds: follow from the pattern.
    """

    kinds: list[str] = field(default_factory=list)
    """Empty: those of the pattern. Naming others is refused."""
    pattern: str = choice("neuron", "head")
    """`neuron`: rows and columns of one unit of an MLP. `head`: queries, key and value of one key head, and what reads
    their output."""
    density: float = field(default=0.5, metadata={"above": 0, "maximum": 1})
    """Share of groups that live in the end."""
    scope: str = choice("matrix", "global")
    """`matrix`: the same share of each MLP, expert or attention. `global`: all groups of the model compete."""

    needs_kinds: ClassVar[bool] = False

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And blocks without a live group."""
        yield from super().problems(config)
        if self.kinds:
            yield f"{self.key('kinds')}: {', '.join(self.kinds)}, but {self.key('pattern')} decides; remove it"
            return
        if self.pattern == "head" and config.model.multi_latent_attention:
            yield from latent_conflict(
                self, config.model, f"has heads of ordinary attention alone; set {self.key('pattern')}=neuron"
            )
            return
        blocks, _ = self.blocks(ParameterTable.of(config))
        for count in {block.count for block in blocks}:
            if self.scope == "matrix" and self.dead_of(count) == count:
                yield f"{self.key('density')}: {self.density} leaves none of {count} {self.pattern}s alive; raise it"

    def dead_groups(self) -> str:
        """The pattern's."""
        return self.pattern

    def marks(self, kind: ParameterKind) -> bool:
        """Matrices of the pattern."""
        return kind.init in PATTERN_KINDS[self.pattern] and kind.fp8 and kind.name != "attention_gate"

    def blocks(self, table: ParameterTable) -> tuple[list[Any], list[int]]:
        """As `model_blocks`."""
        return model_blocks(self.matrices(table), table.model, self.pattern)

    def dead_of(self, count: int, share: float = 1.0) -> int:
        """Groups of a block of `count` that are dead once `share` of the way has been gone."""
        return round(share * (count - round(self.density * count)))

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """By share of the block; with a global scope as if every block had its share."""
        matrices = self.matrices(table)
        blocks, of_matrix = model_blocks(matrices, table.model, self.pattern)
        share = self.share(context) if self.is_zeroing(context) else 0.0
        dead = [self.dead_of(block.count, share) / block.count for block in blocks]
        return [matrix.size * (1 - dead[number]) for matrix, number in zip(matrices, of_matrix, strict=True)]


class GroupMarks(ZeroedWeights):
    """Marks that weights of a group share.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: GroupMechanism

    def __init__(self, settings: GroupMechanism, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self.groups = Groups(self.places, self.table.model, settings.pattern)

    def smallest(self, scores: Tensor, context: StepContext) -> list[Tensor]:
        """Marks of each piece for the groups with the smallest scores. Local.

        Args:
            scores: [groups], the same on every process.
            context: the step.
        """
        share = self.settings.share(context)
        dead = [self.settings.dead_of(block.count, share) for block in self.groups.blocks]
        is_global = self.settings.scope == "global"
        marks = smallest_groups(scores, self.groups.blocks, dead, is_global=is_global)
        return self.groups.spread(marks)

    def root_mean_squares(self) -> Tensor:
        """Root mean square of each group, [groups]: groups of all sizes compare. Collective over all processes."""
        return self.groups.norms() / self.groups.sizes.sqrt()
