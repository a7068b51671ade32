"""Collects parameter norms and router statistics of the same steps in each layout. Started by torchrun with four ranks.

Arguments: the checkpoint of each model as dense=DIR moe=DIR, then the JSON file to write: {layout: steps of layers}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import CP2, EP2, LAYOUTS, PP2, Layout
from tests.helpers.megatron import SMALL
from tests.helpers.training import collected_steps

if TYPE_CHECKING:
    from sparsecod_megatron.metrics import Statistics
    from sparsecod_megatron.train.setup import Trainer

STEPS = 2
RUN = (
    *SMALL,
    "model.num_layers=4",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
    "optimizer.lr=1e-2",
    # Of the order of the gradient: with Adam's usual one, an element whose gradients are rounding noise moves with the
    # sign of the noise.
    "optimizer.adam_eps=1e-3",
)
MODELS = {
    "dense": (),
    "moe": (
        "model.num_moe_experts=4",
        "model.moe_ffn_hidden_size=24",
        "model.moe_shared_expert_intermediate_size=24",
    ),
}
ALL_LAYOUTS = [*LAYOUTS, Layout("cp2-ep2", "moe", 4, (CP2, EP2)), Layout("pp2-ep2", "moe", 4, (PP2, EP2))]


def layout_config(layout: Layout) -> RunConfig:
    """The run of a layout."""
    return load_config(None, [*RUN, *MODELS[layout.model], *layout.overrides])


def statistics(trainer: Trainer) -> list[list[Statistics]]:
    """Both groups, by step and layer. Collective over all processes."""
    from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
    from sparsecod_megatron.metrics.router import RouterGroup
    from sparsecod_megatron.model import unwrap

    models = [unwrap(model) for model in trainer.models]
    groups = [ParameterNormsGroup(models, trainer.optimizer), RouterGroup(models)]
    return collected_steps(trainer, groups, steps=STEPS)


def main() -> None:
    """Write the file from rank 0."""
    *sources, output = sys.argv[1:]
    source = {name: Path(path) for name, path in (item.split("=") for item in sources)}
    backend = select_backend()
    from sparsecod_megatron.checkpoint import load_checkpoint
    from sparsecod_megatron.parallel import process_groups, world
    from sparsecod_megatron.train.setup import build_trainer

    collected = {}
    with world(communication=backend.communication, device=backend.device):
        for layout in ALL_LAYOUTS:
            config = layout_config(layout)
            with process_groups(config) as groups:
                trainer = build_trainer(config, backend, groups)
                load_checkpoint(
                    source[layout.model],
                    config=config,
                    models=trainer.models,
                    optimizer=trainer.optimizer,
                    scheduler=trainer.scheduler,
                    groups=groups,
                )
                collected[layout.name] = statistics(trainer)
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(collected))


if __name__ == "__main__":
    main()
