"""The definitions once more, as plainly as can be: one whole forward pass of the model for each intervention.

Shares nothing with the package: blocks are changed by forward hooks, everything is kept, sums are taken in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Edit = Callable[[Tensor, Tensor], Tensor]
"""(block's input, block's output) → the output to go on with."""


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def edited(block: nn.Module, edit: Edit) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = edit(args[0], first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> tuple[list[Tensor], Tensor]:
    """The residual stream [L + 1] of [N, T, d] and logits [N, T, V] of windows [N, T + 1]."""
    hidden: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not hidden:
            hidden.append(args[0])
        hidden.append(first(output))

    handles = [block.register_forward_hook(note) for block in blocks]
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return hidden, logits


def mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean cross entropy over all tokens of windows [N, T + 1]."""
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def causal(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """C [L, L] and its maximum over tokens, zero where a block is not after the skipped one."""
    num_layers = len(blocks)
    hidden, _ = run(model, blocks, windows)
    effect, largest = np.zeros((num_layers, num_layers)), np.zeros((num_layers, num_layers))
    for skipped in range(num_layers - 1):
        with edited(blocks[skipped], lambda before, _after: before):
            changed, _ = run(model, blocks, windows)
        for layer in range(skipped + 1, num_layers):
            delta = hidden[layer + 1] - hidden[layer]
            moved = (changed[layer + 1] - changed[layer] - delta).norm(dim=-1)
            effect[skipped, layer] = moved.mean() / delta.norm(dim=-1).mean()
            largest[skipped, layer] = (moved / delta.norm(dim=-1)).max()
    return effect, largest


def permutation(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> np.ndarray:
    """P [L, L] of each pair, signed, above the diagonal."""
    num_layers = len(blocks)
    loss = mean_loss(model, windows)
    result = np.zeros((num_layers, num_layers))
    for i in range(num_layers):
        for j in range(i + 1, num_layers):
            blocks[i], blocks[j] = blocks[j], blocks[i]
            result[i, j] = mean_loss(model, windows) / loss - 1
            blocks[i], blocks[j] = blocks[j], blocks[i]
    return result


def usefulness(
    model: PreTrainedModel, blocks: nn.ModuleList, fit: Tensor, held_out: Tensor, *, transposed: bool
) -> np.ndarray:
    """U [L], block by block: collect, lstsq on all activations, replace; `transposed` puts A where A^T belongs."""
    loss = mean_loss(model, held_out)
    result = []
    for layer, block in enumerate(blocks):
        hidden, _ = run(model, blocks, fit)
        x = hidden[layer].flatten(0, 1).double()
        y = hidden[layer + 1].flatten(0, 1).double()
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], dim=1), y).solution
        weights, bias = solution[:-1], solution[-1]
        linear = nn.Linear(len(weights), len(weights)).double()
        linear.weight.data.copy_(weights if transposed else weights.T)
        linear.bias.data.copy_(bias)
        with edited(block, lambda before, _after, linear=linear: linear(before.double()).float()):  # type: ignore[misc]
            result.append(mean_loss(model, held_out) / loss)
    return np.array(result)


def skip_loss(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> np.ndarray:
    loss = mean_loss(model, windows)
    result = []
    for block in blocks:
        with edited(block, lambda before, _after: before):
            result.append(mean_loss(model, windows) / loss - 1)
    return np.array(result)


def token_jacobian(model: PreTrainedModel, blocks: nn.ModuleList, window: Tensor, layer: int, position: int) -> Tensor:
    """[d, d] of one token by one backward pass of the real block for each output channel."""
    block_input: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}

    def differentiate(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = first(output)[0, position]
        rows = [torch.autograd.grad(channel, block_input["x"], retain_graph=True)[0][0, position] for channel in after]
        result["jacobian"] = torch.stack(rows)

    def detach(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        block_input["x"] = args[0].detach().requires_grad_()
        return (block_input["x"], *args[1:])

    handles = [
        blocks[layer].register_forward_pre_hook(detach),
        blocks[layer].register_forward_hook(differentiate),
    ]
    model(input_ids=window[None, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    return result["jacobian"]


def reference_jacobian(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor, layer: int) -> float:
    """||E[J] - I||_F / d with J summed over output positions and averaged over input tokens."""
    hidden, _ = run(model, blocks, windows)
    size, rows = hidden[layer].shape[-1], []
    leaf: dict[str, Tensor] = {}

    def detach(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaf["x"] = args[0].detach().requires_grad_()
        return (leaf["x"], *args[1:])

    outputs: list[Tensor] = []
    handles = [
        blocks[layer].register_forward_pre_hook(detach),
        blocks[layer].register_forward_hook(lambda _module, _args, output: outputs.append(first(output))),
    ]
    model(input_ids=windows[:, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    for channel in range(size):
        gradient = torch.autograd.grad(outputs[0][..., channel].sum(), leaf["x"], retain_graph=True)[0]
        rows.append(gradient.flatten(0, 1).mean(dim=0))
    return float((torch.stack(rows) - torch.eye(size)).norm() / size)
