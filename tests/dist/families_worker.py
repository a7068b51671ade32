"""Trains imported models of several families on, two steps in each of their layouts. Started by torchrun.

Arguments: the folder of imported runs, one called as each family, and the JSON file to write, {case: run}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import EP2, PP2, SP, TP2, SpreadCase
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses, recorded_steps, trainer_batches

RUN = (
    "precision.dtype=fp32",
    "data.seq_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "schedule.lr_decay_style=constant",
    "optimizer.lr=1e-2",
    "optimizer.adam_eps=1e-3",  # as in variants_worker.py
)
LAYOUTS = {"tp2-sp": (TP2, SP), "pp2": (PP2,), "ep2": (EP2,)}
DENSE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "phi3",
    "granite",
    "olmo2",
    "olmo3",
    "neox",
    "neox-sequential",
    "gemma",
    "gemma2",
    "gemma3",
]
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "deepseek-v2", "olmoe", "gpt-oss"]
FAMILIES = dict.fromkeys(DENSE, ("tp2-sp", "pp2")) | dict.fromkeys(EXPERTS, ("ep2", "pp2"))
FAMILIES |= {"deepseek-v3": ("tp2-sp", "ep2", "pp2")}
"""Family → its layouts."""


class Case(SpreadCase):
    """A family (`model`) in a layout."""

    def config(self, runs: Path) -> RunConfig:
        """The run."""
        return load_config(runs / self.model / "config.yaml", [*RUN, *LAYOUTS.get(self.layout, ())])


CASES = [Case(family, "", layout) for family, layouts in FAMILIES.items() for layout in layouts]


def train(case: Case, runs: Path, backend: Backend, groups: Any) -> dict[str, Any]:
    """Losses and gradient norms from the imported weights on. Collective over all processes."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.train.setup import build_trainer

    with fresh_router_losses():
        trainer = build_trainer(case.config(runs), backend, groups)
        load_checkpoint(resolve_step_dir(runs / case.model), trainer)
        return recorded_steps(trainer, trainer_batches(trainer), range(1, 3))


def main() -> None:
    """Write the file from rank 0."""
    runs, output = map(Path, sys.argv[1:])
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, output) as found:
        for layout in LAYOUTS:
            cases = [case for case in CASES if case.layout == layout]
            with process_groups(cases[0].config(runs)) as groups:
                found.update({case.name: train(case, runs, backend, groups) for case in cases})


if __name__ == "__main__":
    main()
