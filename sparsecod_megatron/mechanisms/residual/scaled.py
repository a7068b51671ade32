"""The residual stream with factors: x ← skip · x + branch · f. The null model of every other remedy.

Constant factors are the 1 / √(2L) of a branch (variance 2 at the end in place of 1 + 2L), DeepNorm's skip (2L)^¼
under `model.norm_placement: post`; a learned scalar that begins at 0 is ReZero or SkipInit, a learned vector that
begins at 1e-4 or less is LayerScale. With skip · x = x the factor folds into the rows of the output projections, so a
pre-norm model is exported into a stock class.

Source: Bachlechner et al., ReZero (arXiv 2003.04887); De and Smith, SkipInit (arXiv 2002.10444); Touvron et al.,
LayerScale (arXiv 2103.17239); Wang et al., DeepNorm (arXiv 2203.00555), whose smaller initial values are set by
`model.init_std`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, at_least, choice
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.seams.mechanism import Folds, Module, RankShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

DEEP_INITS = ("scaled", "mitchell", "small_init")
"""Values of `model.init` that make output projections smaller with depth."""
_FACTOR = ".write.factor"
_JOINS = {
    **dict.fromkeys(("attention_output", "attention_output_bias"), "self_attn_bda"),
    **dict.fromkeys(("mlp_output", "mlp_output_bias"), "mlp_bda"),
}
"""Kind of output projection, or of its bias → the join behind it."""
_FOLDABLE = ("pre", "post", "mix")
"""`model.norm_placement` under which no norm stands between an output projection and the join."""


@dataclass
class Scaled(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "scaled"
    placements: ClassVar[tuple[str, ...]] = ("pre", "post", "peri", "sandwich", "mix")

    skip: float = above(0, 1.0)
    """Factor on the stream."""
    branch: float = at_least(0, 1.0)
    """Factor on the branch, or what a learned one begins at."""
    learn: str = choice("none", "scalar", "channel")
    """What is learned of the branch's factor: nothing, one number per branch, or one per channel."""
    rate: float = above(0, 1.0)
    """Factor on the learning rate of what is learned."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Depth that is counted twice."""
        yield from super().problems(config)
        if self.branch != 1 and config.model.init in DEEP_INITS:
            yield (
                f"model.init: {config.model.init} makes branches small at depth, and mechanisms.scaled.branch="
                f"{self.branch:g} again; use model.init=normal"
            )

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """The factor."""
        if self.learn == "none":
            return ()
        size = 1 if self.learn == "scalar" else model.hidden_size
        return (StreamParameter("factor", (size,), rate=self.rate),)

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch, by which a learned factor has its gradient."""
        return 0 if self.learn == "none" else model.hidden_size * rank.value_bytes

    def folds(self, model: ModelConfig) -> bool:
        """Whether the factor can be a part of the output projections."""
        return self.skip == 1 and model.norm_placement in _FOLDABLE

    def folded(self, table: ParameterTable, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With the factors in the rows of the output projections."""
        return FoldedTensors(self.branch, table, tensors) if self.folds(table.model) else tensors

    def fold(self, model: ModelConfig, whole: GPTModel) -> None:
        """Leave joins with a factor of 1."""
        joins = [getattr(layer, join) for layer in whole.decoder.layers for join in set(_JOINS.values())]
        for join in joins if self.folds(model) else ():
            del join.write.factor
            join.write.factor = 1.0

    def export(self, model: ModelConfig) -> Module | Folds:
        """A stock class, or the same path in a model of our own class."""
        return Folds() if self.folds(model) else super().export(model)


class FoldedTensors(Mapping[str, "Tensor"]):
    """Tensors by name, without factors, and with output projections (weight and bias) whose rows they multiply.

    Args:
        constant: factor of joins without a learned one.
        table: of the run.
        tensors: under their names in a single-process GPTModel.
    """

    def __init__(self, constant: float, table: ParameterTable, tensors: Mapping[str, Tensor]) -> None:
        self._constant, self._table, self._tensors = constant, table, tensors

    def __getitem__(self, name: str) -> Tensor:
        """On the stored tensors' device; output projections in fp32, exact where factors are powers of two."""
        tensor = self._tensors[name]
        layer = re.match(r"(?:module\.)*decoder\.layers\.\d+\.", name)
        if layer is None or name.endswith(_FACTOR):
            return tensor
        kind = self._table.find(name)
        if (join := _JOINS.get(kind.init or kind.name)) is None:
            return tensor
        assert tensor.shape[0] == self._table.model.hidden_size, f"{name} has no row for each channel of the stream"
        factor = f"{layer[0]}{join}{_FACTOR}"
        if factor in self._tensors:
            rows = self._tensors[factor].float()
            return tensor.float() * (rows if tensor.dim() == 1 else rows.unsqueeze(-1))
        return tensor.float() * self._constant

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if not name.endswith(_FACTOR))

    def __len__(self) -> int:
        return sum(1 for _ in self)
