"""The blocks of any HuggingFace causal LM, found by how its modules feed each other, without per-model code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.foreign import running
from sparsecod_megatron.hf.residual_state import ResidualState, residual_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL_TOKENS = 4


@dataclass(frozen=True)
class Layers:
    """Where a model keeps its depth.

    Attributes:
        name: name of the block list inside the model, such as `model.layers`.
        blocks: [L] the residual blocks; entries may be swapped while a score runs.
        embed: token ids → `h_0`, before whatever the model adds or scales.
        final_norm: the module that takes the last block's output, or None where it goes straight to the head.
        head: hidden states → logits, before whatever the model scales or caps.
        hidden_size: width d of the residual stream, which may differ from the embeddings'.
        state: how scores see what blocks keep of a token, which may be several such vectors.
    """

    name: str
    blocks: nn.ModuleList
    embed: nn.Module
    final_norm: nn.Module | None
    head: nn.Module
    hidden_size: int
    state: ResidualState = field(default_factory=ResidualState)

    def __len__(self) -> int:
        return len(self.blocks)


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments: the first positional one, or `hidden_states`."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def hidden_output(output: Any) -> Tensor | None:
    """The hidden states in a module's output: itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) else None


def find_layers(model: PreTrainedModel) -> Layers:
    """Find the longest list of blocks in which each block's output is the next one's input.

    Runs the model twice on a few tokens. A list of experts is never taken: its members do not feed each other.

    Args:
        model: a causal LM in evaluation mode.

    Raises:
        ConversionError: an encoder-decoder, a bidirectional encoder, a model that needs more than token ids, or one
            without such a list, embeddings or head.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConversionError(f"{kind}: is an encoder-decoder; give a decoder-only causal language model")
    candidates = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    calls = _trial(model)
    chains = {name: blocks for name, blocks in candidates.items() if _is_chain(blocks, calls)}
    if not chains:
        seen = ", ".join(f"{name} ({len(blocks)})" for name, blocks in candidates.items()) or "no list of modules"
        raise ConversionError(
            f"{kind}: no list of blocks each of which is called once, with the output of the one before, and keeps its "
            f"shape (looked at: {seen}); give a model that is a stack of residual blocks"
        )
    name = max(chains, key=lambda found: len(chains[found]))  # the first, so the outermost, of the longest
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embed is None or head is None:
        raise ConversionError(f"{kind}: has no input embeddings or no output head; give a causal language model")
    state = residual_state(chains[name][0])
    hidden_size = calls[chains[name][0]][0][0].shape[-1] // state.columns
    return Layers(name, chains[name], embed, _final_norm(model, chains[name], calls), head, hidden_size, state)


_Calls = dict[nn.Module, list[tuple[Tensor, Tensor]]]
"""Module → (hidden input, hidden output) of each of its calls, modules in the order of their first call's end."""


def _trial(model: PreTrainedModel) -> _Calls:
    """Every module's hidden states while the model sees a few tokens.

    Raises:
        ConversionError: the model does not run on token ids alone, or a token's logits depend on later tokens.
    """
    calls: _Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before, after = hidden_input(args, kwargs), hidden_output(output)
        if before is not None and after is not None:
            calls.setdefault(module, []).append((before, after))

    tokens = trial_tokens(model)
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    with torch.no_grad(), running(model, "a pass over token ids alone", "give a causal language model of text"):
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        others = model(input_ids=torch.cat([tokens[:, :-1], tokens[:, -2:-1]], dim=1), use_cache=False).logits
    before = logits[:, : TRIAL_TOKENS - 1].float()
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps) * before.abs().max()
    if (before - others[:, : TRIAL_TOKENS - 1].float()).abs().max() > rounding:
        raise ConversionError(
            f"{type(model).__name__}: what it predicts for a token changes with later tokens, as in an encoder "
            "(`is_decoder: false` in config.json?); give a causal language model"
        )
    return calls


def trial_tokens(model: PreTrainedModel) -> Tensor:
    """[1, 4] token ids that differ, where the vocabulary has as many."""
    return torch.arange(TRIAL_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size


def _is_chain(blocks: nn.ModuleList, calls: _Calls) -> bool:
    """Whether each block ran once, kept the shape [1, T, d], and passed its output on to the next."""
    ran = [calls.get(block, []) for block in blocks]
    if any(len(block_calls) != 1 for block_calls in ran):
        return False
    pairs = [block_calls[0] for block_calls in ran]
    if any(before.dim() != 3 or before.shape != after.shape for before, after in pairs):
        return False
    return all(torch.equal(pairs[i][1], pairs[i + 1][0]) for i in range(len(pairs) - 1))


def _final_norm(model: PreTrainedModel, blocks: nn.ModuleList, calls: _Calls) -> nn.Module | None:
    """The first module after the last block that takes that block's output and keeps its shape."""
    last = calls[blocks[-1]][0][1]
    inside = set(blocks.modules())
    for module, module_calls in calls.items():
        before, after = module_calls[0]
        if module not in inside and module is not model.get_output_embeddings() and before is last:
            return module if after.shape == last.shape else None
    return None


@contextmanager
def swapped(blocks: nn.ModuleList, replacements: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put other modules in places of the list while the block runs; references change hands, no weight is copied."""
    originals = {layer: blocks[layer] for layer in replacements}
    try:
        for layer, module in replacements.items():
            blocks[layer] = module
        yield
    finally:
        for layer, module in originals.items():
            blocks[layer] = module
