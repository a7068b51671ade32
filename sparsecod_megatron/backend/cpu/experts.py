"""All experts of one layer as one operation, in place of a loop over modules.

Megatron's SequentialMLP runs four autograd functions an expert and splits and joins the tokens around them. Here one
function walks over the experts: what an expert's products write is still in the cache when its activation reads it,
results go straight to where they belong, and products have few different shapes. Parameters and checkpoints are
SequentialMLP's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from sparsecod_megatron.backend import choice
from sparsecod_megatron.backend.cpu import products
from sparsecod_megatron.backend.cpu.linear import weight_gradient

# Upstream's own, taken before the redirections replace them.
_upstream = SequentialMLP.forward
_sort_chunks = token_dispatcher.sort_chunks_by_idxs


@dataclass(frozen=True)
class Window:
    """Rows that an expert's products run over: its own, and neighbours' up to a size that comes back.

    oneDNN generates code for every new shape, which costs more than a small product; token counts change every step,
    but rounded up they repeat. torch's own products take rows as they come.

    Attributes:
        rows: the expert's own among the sorted tokens.
        around: those the products run over.
        inner: the expert's own within `around`.
    """

    rows: slice
    around: slice
    inner: slice

    def mask(self, probabilities: Tensor) -> Tensor:
        """Probabilities [tokens] of these rows, 0 for neighbours, so that they add nothing: [size, 1]."""
        if self.around == self.rows:
            return probabilities[self.rows, None]
        masked = probabilities.new_zeros(self.around.stop - self.around.start, 1)
        masked[self.inner, 0] = probabilities[self.rows]
        return masked

    def write(self, target: Tensor, product: Callable[..., Tensor], *operands: Tensor, by_onednn: bool) -> None:
        """Put the expert's own rows of a product of `operands` where they belong in target [tokens, out]."""
        if self.around == self.rows:
            product(*operands, by_onednn, target[self.rows])
        else:
            target[self.rows] = product(*operands, by_onednn)[self.inner]


def windows(counts: list[int], rounded: bool) -> Iterator[Window]:
    """The window of each expert, of rows sorted by expert; its own rows alone unless `rounded`."""
    total, first = sum(counts), 0
    for count in counts:
        size = min(products.repeated_size(count), total) if rounded else count
        # Near the end a window reaches back over earlier neighbours, instead of past the last row.
        start = min(first, total - size)
        inner = slice(first - start, first - start + count)
        yield Window(slice(first, first + count), slice(start, start + size), inner)
        first += count


class SwiGLU:
    """silu(gate) · up of what the first product gives, (gate, up) [rows, 2F]; kept as it is for the backward pass."""

    @staticmethod
    def activated(entered: Tensor, mask: Tensor) -> Tensor:
        """mask · activation, [rows, F], of `entered`, which is kept; mask [rows, 1]."""
        gate, up = entered.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(mask)

    @staticmethod
    def again(kept: Tensor) -> tuple[Tensor, Tensor]:
        """The activation [rows, F], and what its gradient needs beside `kept`.

        Computed again in the backward pass: it is cheap, and would be half as large again to keep.
        """
        gate, up = kept.chunk(2, dim=-1)
        silu = F.silu(gate)
        return silu * up, silu

    @staticmethod
    def gradient(grad: Tensor, kept: Tensor, silu: Tensor) -> Tensor:
        """[rows, F] → [rows, 2F]."""
        gate, up = kept.chunk(2, dim=-1)
        entered = torch.empty_like(kept)
        grad_gate, grad_up = entered.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.mul(torch.ops.aten.silu_backward(grad, gate), up, out=grad_gate)
        return entered


class ReLU:
    """max(0, x), which is all that the backward pass needs: it takes the place of x."""

    @staticmethod
    def activated(entered: Tensor, mask: Tensor) -> Tensor:
        """mask · activation, [rows, F]; `entered` becomes what is kept."""
        return entered.relu_() * mask

    @staticmethod
    def again(kept: Tensor) -> tuple[Tensor, Tensor]:
        """The activation, and itself."""
        return kept, kept

    @staticmethod
    def gradient(grad: Tensor, kept: Tensor, _: Tensor) -> Tensor:
        """[rows, F] → [rows, F]."""
        gradient: Tensor = torch.ops.aten.threshold_backward(grad, kept, 0)
        return gradient


class SquaredReLU(ReLU):
    """max(0, x)², of which max(0, x) is kept."""

    @staticmethod
    def activated(entered: Tensor, mask: Tensor) -> Tensor:
        """mask · activation, [rows, F]; `entered` becomes what is kept."""
        return entered.relu_().square().mul_(mask)

    @staticmethod
    def again(kept: Tensor) -> tuple[Tensor, Tensor]:
        """The activation, and its root."""
        return kept.square(), kept

    @staticmethod
    def gradient(grad: Tensor, kept: Tensor, _: Tensor) -> Tensor:
        """[rows, F] → [rows, F]."""
        return (grad * kept).mul_(2)


Activation = type[SwiGLU] | type[ReLU]
_ACTIVATIONS: dict[tuple[bool, Callable[..., Tensor]], Activation] = {
    (True, F.silu): SwiGLU,
    (False, F.relu): ReLU,
    (False, squared_relu): SquaredReLU,
}
"""By whether it is gated, and Megatron-Core's function."""


class FusedExperts(torch.autograd.Function):
    """Rows of expert e become probability · W2_e activation(W1_e x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probabilities: Tensor,
        counts: list[int],
        activation: Activation,
        experts: Sequence[MLP] | None,
        *weights: Tensor,
    ) -> Tensor:
        """Run every expert on its rows.

        Args:
            ctx: autograd's.
            x: [tokens, H], sorted by expert.
            probabilities: the router's, [tokens].
            counts: rows of each expert.
            activation: between the products.
            experts: the modules whose hooks are to see what passes; None has none.
            *weights: W1 [F or 2F, H] and W2 [H, F] of each expert; gradients are added to their `main_grad`, where
                they have one and their layers ask for it.

        Returns:
            [tokens, H].
        """
        by_onednn, rounded = _by_onednn(x)
        output, kept = torch.empty_like(x), []
        for index, window in enumerate(windows(counts, rounded)):
            expert, (entry, exit_) = experts[index] if experts else None, weights[2 * index : 2 * index + 2]
            if expert is not None:
                _show(expert, x[window.rows], probabilities[window.rows])
                _show(expert.linear_fc1, x[window.rows])
            entered = products.output(x[window.around], entry, by_onednn)
            activated = activation.activated(entered, window.mask(probabilities))
            if expert is not None:
                _show(expert.linear_fc2, activated[window.inner])
            window.write(output, products.output, activated, exit_, by_onednn=by_onednn)
            kept.append(entered)
        ctx.save_for_backward(x, probabilities, *weights, *kept)
        ctx.counts, ctx.by_onednn, ctx.rounded, ctx.activation = counts, by_onednn, rounded, activation
        # Not saved with the tensors: they change in place between forward and backward.
        fuse = experts is not None and experts[0].linear_fc1.gradient_accumulation_fusion
        ctx.main_grads = [getattr(weight, "main_grad", None) if fuse else None for weight in weights]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """[tokens, H] → gradients of x, probabilities and weights."""
        x, probabilities, *others = ctx.saved_tensors
        weights, kept_by_expert = others[: 2 * len(ctx.counts)], others[2 * len(ctx.counts) :]
        grad_x, grad_probabilities = torch.empty_like(x), torch.empty_like(probabilities)
        grads: list[Tensor | None] = [None] * len(weights)
        for expert, (window, kept) in enumerate(zip(windows(ctx.counts, ctx.rounded), kept_by_expert, strict=True)):
            entry, exit_ = 2 * expert, 2 * expert + 1
            mask = window.mask(probabilities)
            plain, factor = ctx.activation.again(kept)
            grad_plain = products.input_gradient(grad[window.around], weights[exit_], ctx.by_onednn)
            # Before the mask: the output is probability · (W2 · plain), whose derivative is W2 · plain without it.
            grad_probabilities[window.rows] = torch.linalg.vecdot(grad_plain, plain)[window.inner]
            grad_plain.mul_(mask)
            grad_entered = ctx.activation.gradient(grad_plain, kept, factor)
            window.write(grad_x, products.input_gradient, grad_entered, weights[entry], by_onednn=ctx.by_onednn)
            # Neighbours' rows are zero in `grad_entered` and in the masked `plain`, so they add nothing to a gradient.
            masked = plain * mask if plain is kept else plain.mul_(mask)
            pairs = ((entry, grad_entered, x[window.around]), (exit_, grad[window.around], masked))
            for index, grad_output, operand in pairs:
                main_grad = ctx.main_grads[index]
                grads[index] = weight_gradient(weights[index], main_grad, grad_output, operand, by_onednn=ctx.by_onednn)
        return grad_x, grad_probabilities, None, None, None, *grads


def _by_onednn(x: Tensor) -> tuple[bool, bool]:
    """(whether products are oneDNN's, whether rows are rounded up)."""
    made = choice.in_use()
    # In bf16 torch multiplies by oneDNN anyway, so only the rounding of rows is left to choose.
    is_fp32 = x.dtype == torch.float32
    return is_fp32 and made.experts, made.experts if is_fp32 else made.bf16_rows


def forward(
    self: SequentialMLP, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
) -> tuple[Tensor, None]:
    """SequentialMLP's, for SwiGLU, ReLU and squared ReLU in one number format; others go through its loop.

    Source: Megatron-Core transformer/moe/experts.py, `SequentialMLP.forward`.
    """
    x, probabilities = permuted_local_hidden_states, permuted_probs
    activation = _activation(self)
    experts: list[MLP] = list(self.local_experts)
    if activation is None or not _has_plain_linears(self) or x.dtype != probabilities.dtype or _must_call(experts):
        return _upstream(self, x, tokens_per_expert, probabilities)
    weights = [linear.weight for expert in experts for linear in (expert.linear_fc1, expert.linear_fc2)]
    return FusedExperts.apply(x, probabilities, tokens_per_expert.tolist(), activation, experts, *weights), None


def _show(module: torch.nn.Module, *inputs: Tensor) -> None:
    """Run the hooks that calling this module would run first: observers, and one that gathers weights others stepped.

    Source: Megatron-Core distributed/distributed_data_parallel.py, `_make_forward_pre_hook` (overlap_param_gather).
    """
    for hook in module._forward_pre_hooks.values():
        assert hook(module, inputs) is None, "fused experts have hooks that observe; take cpu_kernels: plain to change"


def _must_call(experts: list[MLP]) -> bool:
    """Whether somebody waits for more than the inputs of an expert and its layers, so that they must be called."""
    modules = (module for expert in experts for module in (expert, expert.linear_fc1, expert.linear_fc2))
    return any(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_pre_hooks_with_kwargs
        for module in modules
    )


def _activation(experts: SequentialMLP) -> Activation | None:
    """What stands between the products, if it is all that does."""
    config = experts.config
    activation = _ACTIVATIONS.get((config.gated_linear_unit, config.activation_func))
    if config.add_bias_linear or config.moe_apply_probs_on_input or config.fp8 or config.fp4:
        return None
    # The gated one has a key with which a user asks for Megatron-Core's loop.
    return None if activation is SwiGLU and not config.bias_activation_fusion else activation


def _has_plain_linears(experts: SequentialMLP) -> bool:
    """Whether the products are all that an expert's linear layers do; a mechanism's own layer must be called."""
    linears = (ColumnParallelLinear, RowParallelLinear)
    return all((type(expert.linear_fc1), type(expert.linear_fc2)) == linears for expert in experts.local_experts)


def sort_chunks(
    input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Chunks of rows in another order; without expert parallelism the order is the one they are in.

    Source: Megatron-Core transformer/moe/moe_utils.py, `sort_chunks_by_idxs`.
    """
    # A comparison of a few integers, where upstream would split and concatenate all rows.
    if torch.equal(sorted_idxs, torch.arange(len(sorted_idxs))):
        return input, probs
    return _sort_chunks(input, split_sizes, sorted_idxs, probs, fused)
