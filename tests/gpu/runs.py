"""What the GPU tests compare: short trainings, and the statistics of one forward pass."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL, run_forward
from tests.helpers.training import small_trainer, trainer_batches

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)

Statistics = list[dict[str, float]]
"""Of one step, by layer."""

SHAPE = (
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.ffn_hidden_size=512",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.vocab_size=512",
    "data.seq_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "optimizer.lr=1e-3",
)
"""Every size a multiple of 128, so that no FP8 recipe falls back to another path."""


@dataclass(frozen=True)
class Training:
    """Losses by step, and the layers' variance statistics of the last one."""

    losses: list[float]
    layers: Statistics


def train(*overrides: str, steps: int) -> Training:
    """The same weights and tokens for every precision."""
    with small_trainer(*SHAPE, *overrides) as trainer:
        from sparsecod_megatron.metrics import StatisticsCollector, VarianceGroup
        from sparsecod_megatron.model import unwrap
        from sparsecod_megatron.train.step import train_step

        variance = VarianceGroup([unwrap(model) for model in trainer.models])
        collector = StatisticsCollector(
            {"variance": variance},
            {"variance": steps},
            num_layers=trainer.config.model.num_layers,
            device=trainer.backend.device,
        )
        data, losses = trainer_batches(trainer), []
        for step in range(1, steps + 1):
            losses.append(train_step(trainer, data, observing=collector.collecting(step)).loss)
        layers = collector.reduce(steps)
        assert layers is not None
        return Training(losses, layers)


def assert_alike(run: Training, reference: Training, *, loss: float, variance: float) -> None:
    """Relative differences of the last losses and of every layer's `out_var` are within these bounds."""
    assert len(run.losses) == len(reference.losses)
    assert abs(run.losses[-1] / reference.losses[-1] - 1) < loss, (run.losses, reference.losses)
    for index, (got, expected) in enumerate(zip(run.layers, reference.layers, strict=True)):
        assert abs(got["out_var"] / expected["out_var"] - 1) < variance, (index, got, expected)


@contextlib.contextmanager
def fresh_model(*, transformer_engine: bool) -> Iterator[torch.nn.Module]:
    """A GPTModel in fp32 on this process's backend while the block runs, of Transformer Engine's layers or ours."""
    config = load_config(None, [*SMALL, "model.hidden_size=64", "model.ffn_hidden_size=96"])
    backend = select_backend()
    from sparsecod_megatron.model import build_model, transformer_config, unwrap
    from sparsecod_megatron.parallel import running_processes

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=transformer_engine)
        chunks = build_model(config, megatron, groups, device=backend.device, transformer_engine=transformer_engine)
        yield unwrap(chunks[0])


def statistics_of(model: torch.nn.Module, tokens: torch.Tensor) -> Statistics:
    """Variance and moments of one forward pass over token ids [B, S]."""
    from sparsecod_megatron.metrics import StatisticsCollector, VarianceGroup
    from sparsecod_megatron.metrics.moments import MomentsGroup

    groups = {"variance": VarianceGroup([model]), "moments": MomentsGroup([model])}
    collector = StatisticsCollector(
        groups, dict.fromkeys(groups, 1), num_layers=len(model.decoder.layers), device=tokens.device
    )
    with collector.collecting(1):
        run_forward(model, tokens)
    layers = collector.reduce(1)
    assert layers is not None
    return layers


def load_plain_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Weights of the reference layers into a dense model of either kind, every one of them."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters.pop(name if name in parameters else _fused(name)).copy_(weight)
    assert not parameters, f"left as they were: {sorted(parameters)}"


def _fused(name: str) -> str:
    """Where Transformer Engine's fused linear layers keep the norm before them."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
