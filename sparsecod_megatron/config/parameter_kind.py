"""One row of the table of parameters (`parameters.py`): every fact that some part of a run needs of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

GROUPS = ("norms", "biases", "embeddings", "output", "router", "residual", "hidden")
"""What `ParameterKind.group` says; the first five are choices of `optimizer.no_weight_decay`."""
NEVER_DECAYS = "residual"
"""The group of what reads and joins the residual path: factors, gates and mixing matrices that mean something at 0."""
RATE_FALLS_WITH_WIDTH = ("hidden", "output", "router")
"""Groups whose learning rate muP divides by `model.width_ratio`."""


class StepFactors(NamedTuple):
    """What a parameter's step is multiplied by.

    Attributes:
        rate: on the learning rate.
        decay: on the weight decay.
        epsilon: on Adam's ε.
    """

    rate: float
    decay: float
    epsilon: float


@dataclass(frozen=True)
class ParameterKind:
    """One parameter of a layer (or of the ends of the model), with its equals in other experts.

    Attributes:
        name: `qkv`, `mlp_input`, `expert_output`, …
        shape: [out, in] of a matrix, [channels] of a norm or bias; of one copy, whole.
        pattern: regular expression of its names in a GPTModel, of whichever backend and stage, without what stands
            before the layer's own part.
        group: one of `GROUPS`: how it decays and learns.
        init: the field of `model.init_std` that a matrix is drawn by; None for vectors, which start at one or zero.
        split: over the ranks of tensor parallelism, of `expert` parallelism (and the experts' tensor parallelism), or
            `none`.
        dimension: the one that tensor parallelism splits; None where ranks hold it whole.
        stacked: matrices that stand one above the other in it, each of which is split (gate over up: 2).
        copies: experts.
        used: copies that one token meets.
        fp8: whether Transformer Engine multiplies it in FP8 under an FP8 recipe.
        looked_up: whether a token takes a row of it, which multiplies nothing.
        rate: factor on the learning rate.
        decay: factor on the weight decay.
        epsilon: factor on Adam's ε.
        rows_read: rows of a table that a token takes, where the others do not count as its active parameters.
        products: numbers of one copy that a token's vector is multiplied by, where they are not the parameter's own: of
            a matrix that is computed from several parameters, all for one of them; None elsewhere.
        channels: key of the configuration, for messages, that gives the size which tensor parallelism splits.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    group: str = "hidden"
    init: str | None = None
    split: str = "none"
    dimension: int | None = None
    stacked: int = 1
    copies: int = 1
    used: int = 1
    fp8: bool = False
    looked_up: bool = False
    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0
    rows_read: int | None = None
    products: int | None = None
    channels: str = ""

    @property
    def total(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape) * self.copies

    @property
    def active(self) -> int:
        """Number of them that one token uses."""
        shape = self.shape if self.rows_read is None else (self.rows_read, *self.shape[1:])
        return math.prod(shape) * self.used

    @property
    def multiplied(self) -> int:
        """Number of those in a matrix that a token's vector is multiplied by: no norms, no look-up."""
        if self.products is not None:
            return self.products * self.used
        return self.active if len(self.shape) == 2 and not self.looked_up else 0

    @property
    def step_factors(self) -> StepFactors:
        """What its step is multiplied by."""
        return StepFactors(self.rate, self.decay, self.epsilon)

    @property
    def is_orthogonalised(self) -> bool:
        """Whether Muon steps it; AdamW steps vectors, embeddings and the output layer."""
        return len(self.shape) == 2 and self.group not in ("embeddings", "output", NEVER_DECAYS)

    def on_rank(self, *, tensor: int, expert: int, expert_tensor: int) -> int:
        """Number of parameters that one rank holds.

        Args:
            tensor: tensor parallel size.
            expert: expert parallel size.
            expert_tensor: tensor parallel size of the experts.
        """
        if self.split == "expert":
            return self.total // (expert * (1 if self.dimension is None else expert_tensor))
        return self.total // {"none": 1, "tensor": tensor}[self.split]
