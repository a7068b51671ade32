"""Feed-forward neurons of a model: what each contributes, seen in a pass or cut below a threshold.

Neuron i of a feed-forward network adds `n_i = a_i · w_down[:, i]` to its output, so its activation is the i-th input of
the down projection. A *site* is one feed-forward network, or all routed experts of a layer; each of its *rows* is a
token in a network, so a token routed to two experts makes two rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecod_megatron.analysis.branches import TOLERANCE, branch_error
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.expert_modules import (
    expert_activations,
    is_fused_experts,
    is_stacked_linear,
    replaced_forward,
    unwatchable,
)
from sparsecod_megatron.hf.matrices import Matrix

_EXPERT_IN_LIST = re.compile(r"(.*\bexperts)\.\d+\.")


class Observer(Protocol):
    """What looks at, and may replace, the activations of a site during a pass."""

    def activations(self, activations: Tensor, norms: Tensor, tokens: Tensor | None, expert: int) -> Tensor:
        """See neuron activations on their way into the down projection.

        Args:
            activations: `[rows, neurons]`.
            norms: `‖n_i‖`, same shape, fp32.
            tokens: which token of the micro-batch each row is `[rows]`; None where all rows are tokens in order, or
                where that is unknown.
            expert: index of the network within its site.

        Returns:
            The activations to continue with.
        """
        ...

    def output(self, output: Tensor) -> None:
        """See the output of the same rows, `[rows, hidden]`."""
        ...


class NeuronSite:
    """One feed-forward network, or all routed experts of one layer.

    Args:
        name: path below the block.
        matrices: the down projections: one, or one for each listed expert, or one that holds all fused experts.
    """

    def __init__(self, name: str, matrices: Sequence[Matrix]) -> None:
        self.name = name
        self.layer = matrices[0].layer
        self.is_fused = is_fused_experts(matrices[0].module)
        self._matrices = matrices
        self._norms = [torch.linalg.vector_norm(self.down(e).detach().float(), dim=0) for e in range(self.num_experts)]

    @property
    def num_experts(self) -> int:
        """Networks of the site: 1 unless it is a layer's routed experts."""
        return len(self._matrices[0].weight) if self.is_fused else len(self._matrices)

    @property
    def rows_have_known_tokens(self) -> bool:
        """False for listed experts, which are handed rows without being told whose they are."""
        return self.is_fused or self.num_experts == 1

    def down(self, expert: int) -> Tensor:
        """The down projection of one network, `[hidden, neurons]`."""
        matrix = self._matrices[0 if self.is_fused else expert]
        weight = matrix.weight[expert] if self.is_fused else matrix.weight
        return weight.t() if matrix.transposed else weight

    def column_norms(self, expert: int) -> Tensor:
        """`‖w_down[:, i]‖` of one network, `[neurons]`, fp32."""
        return self._norms[expert]

    @contextmanager
    def observed(self, observer: Observer, *, check: bool = False) -> Iterator[None]:
        """Let `observer` see every pass through this site.

        Args:
            observer: what looks.
            check: whether fused experts, which are computed one by one here, must give what their module gives in
                the first pass; the observer changes nothing then.
        """
        with ExitStack() as stack:
            if self.is_fused:
                stack.enter_context(replaced_forward(self._matrices[0].module, self._fused_forward(observer, check)))
            else:
                for expert, matrix in enumerate(self._matrices):
                    stack.enter_context(self._hooked(matrix.module, expert, observer))
            yield

    @contextmanager
    def _hooked(self, module: nn.Module, expert: int, observer: Observer) -> Iterator[None]:
        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = args[0].reshape(-1, args[0].shape[-1])
            seen = observer.activations(rows, rows.float().abs() * self.column_norms(expert), None, expert)
            return (seen.reshape(args[0].shape), *args[1:])

        def leave(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            observer.output(output.reshape(-1, output.shape[-1]))

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fused_forward(self, observer: Observer, check: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A forward of fused experts, expert by expert, that shows each one's activations."""
        module = self._matrices[0].module
        biases = getattr(module, "down_proj_bias", None)
        if getattr(module, "has_post_expert_norm", False):
            raise ConversionError(f"{self.name}: experts that normalise their own output are not a sum of neurons")

        is_checked = not check

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            nonlocal is_checked
            combined = torch.zeros_like(hidden)
            for expert in index.unique().tolist():
                if expert >= self.num_experts:  # the index that stands for no expert
                    continue
                tokens, slots = torch.where(index == expert)
                activations = expert_activations(module, hidden[tokens], expert)
                norms = activations.float().abs() * self.column_norms(expert)
                seen = observer.activations(activations, norms, tokens, expert)
                output = F.linear(seen, self.down(expert), None if biases is None else biases[expert])
                observer.output(output)
                combined.index_add_(0, tokens, (output * weights[tokens, slots, None]).to(combined.dtype))
            if not is_checked:
                own = type(module).forward(module, hidden, index, weights)
                error = branch_error(torch.zeros_like(own), own, combined)
                if not error <= TOLERANCE[own.dtype]:
                    raise ConversionError(
                        f"{type(module).__name__}: expert by expert it gives other outputs (relative difference "
                        f"{error:.1e}); leave activation out of --scores"
                    )
                is_checked = True
            return combined

        return forward


def find_sites(matrices: Sequence[Matrix]) -> list[NeuronSite]:
    """All feed-forward networks, in order of layer.

    Args:
        matrices: matrices of the whole model.

    Raises:
        ConversionError: no feed-forward network was found, or one whose neurons cannot be seen.
    """
    groups: dict[tuple[int, str], list[Matrix]] = {}
    for matrix in matrices:
        if matrix.kind == "down":
            if is_stacked_linear(matrix.module):
                raise unwatchable(matrix.module)
            listed = _EXPERT_IN_LIST.match(matrix.name)
            groups.setdefault((matrix.layer, listed[1] if listed else matrix.name), []).append(matrix)
    if not groups:
        raise ConversionError(
            "no feed-forward network in any block (a down projection of what an up projection made of the token): "
            "leave activation out of --scores"
        )
    return [NeuronSite(name, group) for (_, name), group in groups.items()]
