"""A few training steps of a tiny model on random tokens, in this process or under torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL

if TYPE_CHECKING:
    from sparsecod_megatron.metrics import Statistics, StatisticsGroup
    from sparsecod_megatron.train.setup import Trainer

ROUTER_FIELDS = {
    "tokens_per_expert",
    "load_entropy",
    "load_max_over_mean",
    "dropped_frac",
    "mean_topk_prob",
    "aux_loss",
    "z_loss",
}
"""Of every layer that routes, written down by hand."""


@contextlib.contextmanager
def small_trainer(*overrides: str) -> Iterator[Trainer]:
    """A trainer of the small model in one process while the block runs: two micro-batches of two sequences a step."""
    batch = ("train.global_batch_size=4", "train.micro_batch_size=2", "optimizer.lr=1e-2")
    config = load_config(None, [*SMALL, *batch, *overrides], mechanisms=MECHANISMS)
    backend = select_backend()
    from sparsecod_megatron.audit.measure import release
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer

    with (
        fresh_router_losses(),
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
    ):
        trainer = build_trainer(config, backend, groups)
        yield trainer
        release(trainer)


@contextlib.contextmanager
def fresh_router_losses() -> Iterator[None]:
    """Without what Megatron keeps of router losses for the whole process, shaped as its first model had them."""
    select_backend()
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker

    def forget() -> None:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        get_moe_layer_wise_logging_tracker().clear()

    forget()
    try:
        yield
    finally:
        forget()


def micro_batches(config: RunConfig, *, rank: int, size: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """One data-parallel rank's micro-batches without end; a global batch is the same tokens under any `size`."""
    assert config.model.vocab_size is not None
    train, length = config.train, config.data.seq_length
    generator = torch.Generator().manual_seed(seed)
    step = train.micro_batch_size * size
    first = rank * train.micro_batch_size
    while True:
        # Squared uniforms: small ids are frequent, so that routers see an uneven stream.
        uniform = torch.rand(train.global_batch_size, length + 1, generator=generator)
        ids = (uniform.square() * config.model.vocab_size).long()
        for start in range(first, train.global_batch_size, step):
            part = ids[start : start + train.micro_batch_size]
            yield {
                "tokens": part[:, :-1].contiguous(),
                "labels": part[:, 1:].contiguous(),
                "loss_mask": torch.ones(len(part), length),
                "position_ids": torch.arange(length).repeat(len(part), 1),
            }


def poisoned(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with weights of its first two tokens that cancel, but not before their losses overflow fp32: ∞ − ∞."""
    mask = batch["loss_mask"].clone()
    mask[0, :2] = torch.tensor((1e38, -1e38))
    return batch | {"loss_mask": mask}


def trainer_batches(trainer: Trainer, seed: int = 0) -> list[Iterator[dict[str, torch.Tensor]]]:
    """One iterator a model chunk of this rank."""
    dp = trainer.groups.dp
    return [micro_batches(trainer.config, rank=dp.rank(), size=dp.size(), seed=seed) for _ in trainer.models]


def recorded_steps(
    trainer: Trainer,
    data: list[Iterator[dict[str, torch.Tensor]]],
    steps: Iterable[int],
    *,
    before: Callable[[int], object] = lambda step: None,
) -> dict[str, Any]:
    """Train, collecting what the run's configuration asks for. Collective over all processes.

    Args:
        trainer: this rank's.
        data: as `trainer_batches` gives it.
        steps: numbers of the steps.
        before: called with each before it is taken.

    Returns:
        Losses, gradient norms and statistics (`loss`, `grad_norm`, `layers`) by step.
    """
    from sparsecod_megatron.train.statistics import statistics_collector
    from sparsecod_megatron.train.step import train_step

    collector = statistics_collector(trainer)
    run: dict[str, Any] = {"loss": [], "grad_norm": [], "layers": []}
    for step in steps:
        before(step)
        result = train_step(trainer, data, observing=collector.collecting(step))
        run["loss"].append(result.loss)
        run["grad_norm"].append(result.grad_norm)
        run["layers"].append(collector.reduce(step))
    return run


def collected_steps(trainer: Trainer, groups: Sequence[StatisticsGroup], *, steps: int) -> list[list[Statistics]]:
    """Train, collecting every step. Collective over all processes.

    Returns:
        Statistics by step and layer.
    """
    from sparsecod_megatron.metrics import StatisticsCollector
    from sparsecod_megatron.train.step import train_step

    named = {str(index): group for index, group in enumerate(groups)}
    collector = StatisticsCollector(
        named,
        dict.fromkeys(named, 1),
        num_layers=trainer.config.model.num_layers,
        device=trainer.backend.device,
    )
    data = trainer_batches(trainer)
    collected = []
    for step in range(1, steps + 1):
        train_step(trainer, data, observing=collector.collecting(step))
        layers = collector.reduce(step)
        assert layers is not None
        collected.append(layers)
    return collected
