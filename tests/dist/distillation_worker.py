"""Trains towards HuggingFace teachers, and heals a pruned model, in layouts of two processes. Started by torchrun.

Arguments: the JSON file to write, {case: run}, and the folder of the teachers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.dist.layouts import BUCKETS, EP2, FULL_RECOMPUTE, PP2, SP, TP2
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses, trainer_batches

TEACHERS: dict[str, dict[str, Any]] = {
    "untied": {"num_hidden_layers": 4},
    "tied": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "experts": {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
STUDENTS = {
    "untied": ("model.untie_embeddings_and_output_weights=true",),
    "tied": (),
    "experts": ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.moe_router_topk=2"),
}
LAYOUTS = {
    "untied": {"tp2-sp": (TP2, SP), "pp2": (PP2,)},
    "tied": {"tp2": (TP2,), "pp2-full-recompute": (PP2, *FULL_RECOMPUTE)},
    "experts": {"ep2": (EP2,)},
}


def case_config(teacher: str, folder: Path, layout: str = "", *more: str) -> RunConfig:
    """A run towards a teacher."""
    settings = f'{{teacher: "{folder / teacher}", squarehead: 0.5, kl: 0.5, temperature: 2}}'
    overrides = (
        *SMALL,
        "model.num_layers=4",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "model.init_method_std=0.1",
        *STUDENTS[teacher],
        f"mechanisms.distillation={settings}",
        *LAYOUTS[teacher].get(layout, ()),
        *more,
    )
    return load_config(None, list(overrides), mechanisms=MECHANISMS)


def train(config: RunConfig, backend: Backend, groups: Any) -> list[list[float]]:
    """Loss, gradient norm and both terms of two steps. Collective."""
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    with fresh_router_losses():
        trainer = build_trainer(config, backend, groups)
        data, found = trainer_batches(trainer), []
        for step in (1, 2):
            result = train_step(trainer, data)
            found.append([result.loss, result.grad_norm, *trainer.plugins[0].metrics(trainer.context(step)).values()])
        return found


HEALED = "pruned"
"""Directory of the untied teacher with zeros."""
HEALING = (
    "mechanisms.frozen_masks={}",
    "optimizer.weight_decay=0.3",
    "optimizer.clip_grad=0.1",
    "optimizer.lr=1e-2",
)
HEALING_LAYOUTS = {"dp2": (*BUCKETS, "precision.dtype=bf16"), "tp2-sp": (TP2, SP), "pp2": (PP2,)}


def heal(config: RunConfig, backend: Backend, groups: Any, pruned: Path) -> dict[str, int]:
    """Train a model with zeros for three steps, and count what has been zero and what is not any more. Collective."""
    import torch

    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.mechanisms.directory_shards import directory_shards
    from sparsecod_megatron.model import unwrap
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    trainer = build_trainer(config, backend, groups)
    models = [unwrap(model) for model in trainer.models]
    for target, values in directory_shards(open_source(pruned), config, models, groups, key="student"):
        target.data.copy_(values)
    trainer.optimizer.reload_model_params()
    for plugin in trainer.plugins:
        plugin.weights_replaced()
    data = trainer_batches(trainer)
    for _ in range(3):
        train_step(trainer, data)
    masks = next(plugin for plugin in trainer.plugins if plugin.name == "frozen_masks")
    counts = torch.zeros(3, dtype=torch.int64)
    for piece in masks.places.pieces:
        assert len(piece.moments) == 2
        held = (piece.slice_of(piece.shard.parameter.detach()), piece.master, *piece.moments)
        counts[0] += piece.marked.sum()
        counts[1] += sum(int(values[piece.marked].count_nonzero()) for values in held)
        counts[2] += int((piece.master[~piece.marked] == 0).sum())
    dist.all_reduce(counts)
    reported = masks.metrics(trainer.context(3))["live_share"]
    total = sum(matrix.size for matrix in masks.places.matrices)
    zeros, broken, lost = counts.tolist()
    return {
        "zeros": zeros,
        "not zero any more": broken,
        "zero by training": lost,
        "reported": round(total * (1 - reported)),
    }


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, sys.argv[1]) as runs:
        for teacher, layouts in LAYOUTS.items():
            for layout in layouts:
                config = case_config(teacher, Path(sys.argv[2]), layout)
                with process_groups(config) as groups:
                    runs[f"{teacher}-{layout}"] = train(config, backend, groups)
        for layout, overrides in HEALING_LAYOUTS.items():
            config = case_config("untied", Path(sys.argv[2]), "", *HEALING, *overrides)
            with process_groups(config) as groups:
                runs[f"{HEALED}-{layout}"] = heal(config, backend, groups, Path(sys.argv[2]) / HEALED)


if __name__ == "__main__":
    main()
