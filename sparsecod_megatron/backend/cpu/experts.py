"""All experts of one layer as one operation, in place of a loop over modules.

Megatron's SequentialMLP runs four autograd functions an expert and splits and joins the tokens around them. Here one
function walks over the experts: what an expert's products write is still in the cache when its activation reads it,
results go straight to where they belong, and products have few different shapes. Parameters and checkpoints are
SequentialMLP's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


class SwiGLUExperts(torch.autograd.Function):
    """Rows of expert e become probability · W2_e (silu(gate) · up), with (gate, up) = W1_e x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities: Tensor, counts: list[int], fuse: bool, *weights: Tensor) -> Tensor:
        """Run every expert on its rows.

        Args:
            ctx: autograd's.
            x: [tokens, H], sorted by expert.
            probabilities: the router's, [tokens].
            counts: rows of each expert.
            fuse: add gradients of weights to their `main_grad`, where they have one.
            *weights: [2F, H] and [H, F] of each expert.

        Returns:
            [tokens, H].
        """
        by_onednn, rounded = _by_onednn(x)
        output, entered = torch.empty_like(x), []
        for window, entry, exit_ in zip(windows(counts, rounded), weights[::2], weights[1::2], strict=True):
            gate_up = products.output(x[window.around], entry, by_onednn)
            gate, up = gate_up.chunk(2, dim=-1)
            activated = F.silu(gate).mul_(up).mul_(window.mask(probabilities))
            window.write(output, products.output, activated, exit_, by_onednn=by_onednn)
            # The activation is computed again in the backward pass: it is cheap, and would be half as large again.
            entered.append(gate_up)
        ctx.save_for_backward(x, probabilities, *weights, *entered)
        ctx.counts, ctx.by_onednn, ctx.rounded = counts, by_onednn, rounded
        # Not saved with the tensors: they change in place between forward and backward.
        ctx.main_grads = [getattr(weight, "main_grad", None) if fuse else None for weight in weights]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """[tokens, H] → gradients of x, probabilities and weights."""
        x, probabilities, *others = ctx.saved_tensors
        weights, entered = others[: 2 * len(ctx.counts)], others[2 * len(ctx.counts) :]
        grad_x, grad_probabilities = torch.empty_like(x), torch.empty_like(probabilities)
        grads: list[Tensor | None] = [None] * len(weights)
        for expert, (window, gate_up) in enumerate(zip(windows(ctx.counts, ctx.rounded), entered, strict=True)):
            entry, exit_ = 2 * expert, 2 * expert + 1
            mask = window.mask(probabilities)
            gate, up = gate_up.chunk(2, dim=-1)
            silu = F.silu(gate)
            plain = silu * up
            grad_plain = products.input_gradient(grad[window.around], weights[exit_], ctx.by_onednn)
            # Before the mask: the output is probability · (W2 · plain), whose derivative is W2 · plain without it.
            grad_probabilities[window.rows] = torch.linalg.vecdot(grad_plain, plain)[window.inner]
            grad_plain.mul_(mask)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_plain, silu, out=grad_up)
            torch.mul(torch.ops.aten.silu_backward(grad_plain, gate), up, out=grad_gate)
            window.write(grad_x, products.input_gradient, grad_gate_up, weights[entry], by_onednn=ctx.by_onednn)
            # Neighbours' rows are zero in `grad_gate_up` and in the masked `plain`, so they add nothing to a gradient.
            pairs = ((entry, grad_gate_up, x[window.around]), (exit_, grad[window.around], plain.mul_(mask)))
            for index, grad_output, operand in pairs:
                main_grad = ctx.main_grads[index]
                grads[index] = weight_gradient(weights[index], main_grad, grad_output, operand, by_onednn=ctx.by_onednn)
        return grad_x, grad_probabilities, None, None, *grads


def _by_onednn(x: Tensor) -> tuple[bool, bool]:
    """(whether products are oneDNN's, whether rows are rounded up)."""
    made = choice.in_use()
    # In bf16 torch multiplies by oneDNN anyway, so only the rounding of rows is left to choose.
    is_fp32 = x.dtype == torch.float32
    return is_fp32 and made.experts, made.experts if is_fp32 else made.bf16_rows


def forward(
    self: SequentialMLP, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
) -> tuple[Tensor, None]:
    """SequentialMLP's, for SwiGLU experts in one number format; others go through its loop.

    Source: Megatron-Core transformer/moe/experts.py, `SequentialMLP.forward`.
    """
    x, probabilities = permuted_local_hidden_states, permuted_probs
    if not (_has_plain_swiglu(self) and _has_plain_linears(self)) or x.dtype != probabilities.dtype:
        return _upstream(self, x, tokens_per_expert, probabilities)
    experts: list[MLP] = list(self.local_experts)
    linears = [linear for expert in experts for linear in (expert.linear_fc1, expert.linear_fc2)]
    _announce(linears)
    weights = [linear.weight for linear in linears]
    fuse = experts[0].linear_fc1.gradient_accumulation_fusion
    return SwiGLUExperts.apply(x, probabilities, tokens_per_expert.tolist(), fuse, *weights), None


def _announce(linears: list[torch.nn.Module]) -> None:
    """Run the hooks that calling these modules would run: one of them gathers the weights that others stepped.

    Source: Megatron-Core distributed/distributed_data_parallel.py, `_make_forward_pre_hook` (overlap_param_gather).
    """
    for linear in linears:
        for hook in linear._forward_pre_hooks.values():
            hook(linear, ())


def _has_plain_swiglu(experts: SequentialMLP) -> bool:
    config = experts.config
    return (
        config.bias_activation_fusion  # false is how a user asks for Megatron-Core's loop
        and config.gated_linear_unit
        and config.activation_func is F.silu
        and not config.add_bias_linear
        and not config.moe_apply_probs_on_input
        and not (config.fp8 or config.fp4)
    )


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
