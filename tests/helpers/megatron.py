"""A real Megatron-Core model in this process, small and with weights away from their initial symmetry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.mechanisms import MECHANISMS

SMALL = (
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=64",
    "precision.dtype=fp32",
    "data.seq_length=16",
    "train.global_batch_size=1",
)


@contextlib.contextmanager
def megatron_model(*overrides: str) -> Iterator[torch.nn.Module]:
    """One GPTModel on one process while the block runs, in training mode."""
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    backend = select_backend()
    from sparsecod_megatron.model import build_model, transformer_config, unwrap
    from sparsecod_megatron.parallel import running_processes

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=False)
        chunks = build_model(config, megatron, groups, device=backend.device, transformer_engine=False)
        model = unwrap(chunks[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        yield model


def run_forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of token ids [B, S]."""
    from sparsecod_megatron.model.tokens import all_logits

    return all_logits(model, tokens)


@dataclass(frozen=True)
class BuiltModel:
    """A model as the reference of `verify_directory`."""

    model: torch.nn.Module

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `run_forward`."""
        return run_forward(self.model, tokens)
