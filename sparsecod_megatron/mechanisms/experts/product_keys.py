"""The modules of Monet's experts: gates of product keys, and what reads them in the places of an MLP.

Megatron-Core's MLP stays: its input projection holds the units' input weights of all experts, its output projection
their output weights. Experts are split over tensor-parallel ranks, as units are: of a key's rows, its units and their
columns a rank has those of its experts. Between ranks pass, for each token and head, the largest logit, the sum of
weights, and what a head has of one key's units for the experts of the other: 2 · heads · (2 + m / 2) numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.mechanisms.experts.monet_sparsecod import experts_output, key_gates, quantile
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts


class ProductKeys:
    """Gates of this rank's experts, and the biases of their units and outputs.

    A module of Megatron-Core's with it mixed in; the backward pass sums over ranks what each makes of shared numbers.

    Args:
        config: Megatron-Core's configuration of the layer.
        projection: column-parallel linear layer.
        model: our configuration of the model.
        experts: of each key.
        heads: that each choose keys.
        k: keys that a head is to keep.
        is_vertical: whether both keys have units.
        tp_group: ranks that share the experts.

    Attributes:
        mean: of the logits by key and head, [2 · heads]; a checkpoint keeps it.
        variance: the same.
        sums: of training passes since the last step ended: numbers, sums and sums of squares of the logits, [3, 2,
            heads]; None before the first.
        gates: of the pass that runs, [S, B, E/TP, 2, heads]; None outside of one.
        observe: called with the gates of each pass.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        config: Any,
        *,
        projection: Any,
        model: ModelConfig,
        experts: int,
        heads: int,
        k: int,
        is_vertical: bool,
        tp_group: ProcessGroup,
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        super().__init__(config)  # type: ignore[call-arg]
        module: Any = self
        self.heads, self.reach, self.is_vertical = heads, quantile(k, experts), is_vertical
        self.model, self.tp_group = model, tp_group
        module.projection = build_module(
            projection,
            config.hidden_size,
            experts * 2 * heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="keys",
            tp_group=tp_group,
        )
        for name, size in (("unit_bias", model.ffn_hidden_size), ("output_bias", experts * config.hidden_size)):
            zeros = torch.zeros(size // tp_group.size(), dtype=config.params_dtype)
            module.register_parameter(name, torch.nn.Parameter(zeros))
        module.register_buffer("mean", torch.zeros(2 * heads))
        module.register_buffer("variance", torch.ones(2 * heads))
        self.sums: Tensor | None = None
        self.gates: Tensor | None = None
        self.observe: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """[S_local, B, H] → gates [S, B, E/TP, 2, heads] in fp32. Collective (`tp_group`)."""
        module: Any = self
        logits = module.projection(x)[0].float().unflatten(-1, (-1, 2, self.heads))
        self._count(logits.detach())
        gates = key_gates(logits, self.mean, self.variance, self.reach, largest=self._largest, total=self._total)
        if self.observe is not None:
            self.observe(gates.detach())
        return gates

    def joined(self, units: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
        """Units [S, B, F/TP], gates and output weights [H, F/TP] → [S_local, B, H]. Collective (`tp_group`)."""
        from megatron.core.tensor_parallel import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        module: Any = self
        output = experts_output(
            units, gates, weight, module.output_bias, is_vertical=self.is_vertical, total=self._total
        )
        if module.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Biases are cut as experts are, statistics whole."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        module: Any = self
        own = {name: getattr(self, name) for name in ("unit_bias", "output_bias", "mean", "variance")}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        cut = {"unit_bias": 0, "output_bias": 0}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, cut, sharded_offsets, **groups)
        return state | module.projection.sharded_state_dict(f"{prefix}projection.", sharded_offsets, metadata)

    def _count(self, logits: Tensor) -> None:
        """Add the logits of a training pass; of one that recompute repeats once."""
        from sparsecod_megatron.metrics.hooks import in_backward

        if not self.training or in_backward():  # type: ignore[attr-defined]
            return
        values = logits.flatten(end_dim=2)  # [logits of a head's key, 2, heads]
        total, squares = (part.sum(dim=0, dtype=torch.float64) for part in (values, values.square()))
        sums = torch.stack((torch.full_like(total, len(values)), total, squares))
        self.sums = sums if self.sums is None else self.sums + sums

    def _largest(self, values: Tensor) -> Tensor:
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self.tp_group)
        return values

    def _total(self, values: Tensor) -> Tensor:
        """A sum over ranks each of which then computes with it."""
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        summed = reduce_from_tensor_model_parallel_region(values, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(summed, group=self.tp_group)


class HasKeys:
    """What a layer becomes: its MLP has keys, which both projections know.

    Args:
        *arguments: the layer's.
        keys: builds them, from a configuration and the ranks that share the experts.
        **options: the layer's others.
    """

    def __init__(self, *arguments: Any, keys: functools.partial[Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        layer: Any = self
        layer.mlp.keys = keys(layer.config, tp_group=layer.pg_collection.tp)
        for projection in (layer.mlp.linear_fc1, layer.mlp.linear_fc2):
            projection.shown = (layer.mlp.keys,)  # in a tuple, or they would be parts of it too


class UnitsInput:
    """What an MLP's input projection becomes: it has the keys look at the token, and gives the units' bias with it."""

    shown: tuple[Any, ...] = ()

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """[S_local, B, H] → [S, B, F/TP] and [F/TP]."""
        (keys,) = self.shown
        keys.gates = keys(x)
        parent: Any = super()
        return parent.forward(x, *arguments, **options)[0], keys.unit_bias


class ExpertsOutput:
    """What an MLP's output projection becomes: its input goes to experts by their gates."""

    shown: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[S, B, F/TP] → [S_local, B, H]."""
        (keys,) = self.shown
        gates, keys.gates = keys.gates, None
        return keys.joined(x, gates, self.weight), None  # type: ignore[attr-defined]


class KeyStatistics(Plugin):
    """Moves the keys' means and variances towards those of each step's logits.

    Args:
        name: of the mechanism.
        momentum: how far.
        parts: models and groups of this rank.
    """

    def __init__(self, name: str, momentum: float, parts: StepParts) -> None:
        self.name, self._momentum, self._group = name, momentum, parts.groups.tp_dp_cp
        modules = (module for model in parts.models for module in model.modules())
        self._keys: list[Any] = [module for module in modules if isinstance(module, ProductKeys)]
        for keys in self._keys:  # a 16-bit model made them 16-bit
            keys.mean, keys.variance = keys.mean.float(), keys.variance.float()

    def weights_replaced(self) -> None:
        """Forget what other weights gave."""
        for keys in self._keys:
            keys.sums = None

    @torch.no_grad()
    def step_ended(self, context: StepContext, *, updated: bool) -> None:
        """Take the step's logits, of all its tokens, if it counts. Collective over the ranks of a pipeline stage."""
        if not self._keys:
            return
        sums = torch.stack([keys.sums for keys in self._keys])
        torch.distributed.all_reduce(sums, group=self._group)
        for keys, (count, total, squares) in zip(self._keys, sums, strict=True):
            keys.sums = None
            if updated:
                mean = total / count
                variance = squares / count - mean.square()
                for kept, new in ((keys.mean, mean), (keys.variance, variance)):
                    kept.lerp_(new.flatten().to(kept.dtype), self._momentum)
