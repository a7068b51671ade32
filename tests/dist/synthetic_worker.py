"""Trains on a synthetic task and scores its answers, in each layout. Started with two ranks.

Argument: the JSON file to write: {layout: numbers of the steps and of the validation}.
"""

from __future__ import annotations

import sys
from typing import Any

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import load_config
from tests.dist.layouts import CP2, PP2, SP, TP2
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks

STEPS = 3
RUN = (
    *SMALL,
    "model.vocab_size=null",  # the task's own
    "model.num_layers=2",
    "model.make_vocab_size_divisible_by=2",
    "data.synthetic.task=noisy_recall",
    "data.synthetic.noise=0.5",  # so that samples, and halves of them, have unequal numbers of answers
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.train_steps=3",
    "train.eval_steps=2",
    "optimizer.lr=1e-2",
    "optimizer.adam_eps=1e-3",
)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": (),
    "dp2-mbs1": ("train.micro_batch_size=1",),
    "tp2-sp": (TP2, SP),
    "cp2": (CP2,),
    "pp2": (PP2,),
}


def measured(backend: Backend, groups: Any, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Loss and gradient norm by step, and what validation says after them. Collective over all processes."""
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.answers import score_answers
    from sparsecod_megatron.train.data import RunData, prepare_data
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import evaluate, train_step

    config, tokenizer = prepare_data(load_config(None, [*RUN, *overrides]))
    trainer = build_trainer(config, backend, groups)
    data = RunData(trainer, tokenizer, TrainState())
    batches, task = data.train_batches(0), data.task
    assert task is not None
    steps = [train_step(trainer, batches) for _ in range(STEPS)]
    answers = data.validation_answers(lambda held_out: score_answers(trainer, held_out, task, num_steps=2))
    losses = data.validation_losses(lambda held_out: evaluate(trainer, held_out, num_steps=2))
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "tokens": [step.tokens for step in steps],
        **answers,
        "by_evaluate": losses["validation_loss"],
    }


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, sys.argv[1]) as collected:
        for name, overrides in LAYOUTS.items():
            with process_groups(load_config(None, [*RUN, *overrides])) as groups:
                collected[name] = measured(backend, groups, overrides)


if __name__ == "__main__":
    main()
