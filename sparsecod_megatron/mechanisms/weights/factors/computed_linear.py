"""A parallel linear layer whose weight is computed from factors in every pass, and kept by none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.factors.factors import PLACES
from sparsecod_megatron.seams.mechanism import mixed

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored


def computed_linears(model: torch.nn.Module, mechanism: Factored) -> list[ComputedLinear]:
    """Layers of a model chunk whose weights this mechanism computes."""
    found = [module for module in model.modules() if isinstance(module, ComputedLinear)]
    return [linear for linear in found if linear.mechanism.name == mechanism.name]


def computing(linear: Any, **arguments: Any) -> ModuleSpec:
    """A linear layer's spec, with `ComputedLinear` mixed into it.

    Args:
        linear: class or spec.
        **arguments: of `ComputedLinear`.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(linear, ModuleSpec):
        module, others = mixed(ComputedLinear, linear.module), {**linear.params, **arguments}
        return ModuleSpec(module, others, linear.submodules)
    return ModuleSpec(mixed(ComputedLinear, linear), arguments)


class ComputedLinear:
    """What a parallel linear layer of any backend becomes: its weight is computed from factors in every pass.

    Args:
        *arguments: the layer's.
        mechanism: that says how.
        model: our configuration of the model.
        matrix: row of the plain table of parameters.
        tp_group: ranks that share the matrix.
        **options: the layer's others.
    """

    weight: Any

    def __init__(
        self,
        *arguments: Any,
        mechanism: Factored,
        model: ModelConfig,
        matrix: ParameterKind,
        tp_group: torch.distributed.ProcessGroup | None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, tp_group=tp_group, **options)  # type: ignore[call-arg]
        assert tp_group is not None, "attention and MLPs say which ranks share a matrix"
        self.mechanism, self.model, self.matrix, self.sharing = mechanism, model, matrix, tp_group
        self.factors = mechanism.factors(matrix)
        self.observe_parts: Callable[[Mapping[str, Tensor]], None] | None = None
        self.gradient_accumulation_fusion = False
        plain = self.weight
        if not mechanism.keeps_matrix:
            del self.weight
        module: Any = self
        for factor in self.factors:
            shape = list(factor.shape)
            if factor.dimension is not None:
                shape[factor.dimension] //= tp_group.size()
            parameter: Any = torch.nn.Parameter(plain.new_empty(shape))
            # Megatron-Core reduces gradients of what it is false for over the replicas of an expert.
            parameter.allreduce = getattr(plain, "allreduce", True)
            module.register_parameter(factor.name, parameter)
            if factor.axis is not None:
                module.register_buffer(factor.name + PLACES, plain.new_zeros(shape, dtype=torch.int32))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the layer's own."""
        from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

        parent: Any = super()
        if not self.factors:
            return parent.forward(*arguments, **options)
        tensors = self._parameters_of_matrix()
        if self.observe_parts is not None:
            self.observe_parts(self._parts(*tensors))
        if not torch.is_grad_enabled():
            # As if it had a gradient, so that recomputed passes take the way that the first one took.
            with self._holding(self._composed(*tensors).requires_grad_()):
                return parent.forward(*arguments, **options)
        # Any value but None, a false one too, asks for Transformer Engine's FP8.
        computation = CheckpointWithoutOutput(fp8=None)
        with self._holding(computation.checkpoint(self._composed, *tensors)):
            output = parent.forward(*arguments, **options)
        computation.discard_output_and_register_recompute(output[0])
        return output

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Factors and places cut as they are split; Megatron-Core takes what it does not know for whole."""
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
        from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        groups = {"tp_group": self.sharing, "dp_cp_group": metadata["dp_cp_group"]}
        for factor in (factor for factor in self.factors if factor.dimension is not None):
            for name in (factor.name, factor.name + PLACES):
                if (tensor := getattr(self, name, None)) is None:
                    continue
                place = make_tp_sharded_tensor_for_checkpoint(
                    tensor, prefix + name, factor.dimension, prepend_offsets=sharded_offsets, **groups
                )
                if self.matrix.stacked > 1 and factor.dimension == 0:
                    place = apply_swiglu_sharded_factory(place, sharded_offsets)
                state[prefix + name] = place
        return state

    @torch.no_grad()
    def make_plain(self) -> None:
        """Take what the factors make as the weight, once for all."""
        module: Any = self
        self.weight = torch.nn.Parameter(self._composed(*self._parameters_of_matrix()))
        for factor in self.factors:
            delattr(module, factor.name)
            if factor.axis is not None:
                delattr(module, factor.name + PLACES)
        self.factors = ()

    def _parameters_of_matrix(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    @property
    def _names(self) -> list[str]:
        """What the parameters are called that the matrix is computed from."""
        own = ["weight"] if self.mechanism.keeps_matrix else []
        return own + [factor.name for factor in self.factors]

    def _composed(self, *tensors: Tensor) -> Tensor:
        whole = {factor.name for factor in self.factors if factor.dimension is None}
        parts, ranks = self._parts(*tensors), self.sharing
        summed = {name: SharedFactor.apply(part, ranks) for name, part in parts.items() if name in whole}
        used = {
            name: self.mechanism.part_of_rank(self.matrix, part, ranks.rank(), ranks.size())
            for name, part in summed.items()
        }
        return self.mechanism.composed(self.matrix, {**parts, **used})

    def _parts(self, *tensors: Tensor) -> dict[str, Tensor]:
        parts = dict(zip(self._names, tensors, strict=True))
        sparse = [factor.name + PLACES for factor in self.factors if factor.axis is not None]
        return parts | {name: getattr(self, name) for name in sparse}

    @contextlib.contextmanager
    def _holding(self, weight: Tensor) -> Iterator[None]:
        """The weight where the layer looks for it: before a parameter of that name, which stays where it is."""
        vars(self)["weight"] = weight
        try:
            yield
        finally:
            del vars(self)["weight"]


class SharedFactor(torch.autograd.Function):
    """A factor that every tensor-parallel rank holds whole: its gradient is the sum of theirs.

    Megatron-Core's own (`copy_to_tensor_model_parallel_region`) loses the sum where a gradient is not contiguous, as
    those of a product's second factor can be (0.16.1, tensor_parallel/mappings.py:31).
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """The factor itself."""
        ctx.group = group
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Σ over the group. Collective."""
        if ctx.group.size() == 1:
            return grad, None
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
