"""Collects parameter norms and router statistics of the same steps in each layout. Started by torchrun with four ranks.

Arguments: the checkpoint of each model as dense=DIR moe=DIR, then the JSON file to write: {layout: steps of layers}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import BUCKETS, CP2, EP2, ETP1, PP2, SP, TP2, VPP2, Layout
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import collected_steps

if TYPE_CHECKING:
    from sparsecod_megatron.metrics import Statistics
    from sparsecod_megatron.parallel import ProcessGroups
    from sparsecod_megatron.train.setup import Trainer

STEPS = 2
RUN = (
    *SMALL,
    "model.num_layers=4",
    "train.global_batch_size=8",
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
ALL_LAYOUTS = [  # test_layouts.py has two ranks
    Layout("dp2-tp2-sp", "dense", 4, (TP2, SP, *BUCKETS)),
    Layout("dp2-pp2-vpp2", "dense", 4, (PP2, VPP2, *BUCKETS)),
    Layout("tp2-ep2", "moe", 4, (TP2, SP, EP2, *BUCKETS)),
    Layout("tp2-ep2-etp1", "moe", 4, (TP2, SP, EP2, ETP1, *BUCKETS)),
    Layout("cp2-ep2", "moe", 4, (CP2, EP2)),
    Layout("pp2-ep2", "moe", 4, (PP2, EP2)),
]


def layout_config(layout: Layout) -> RunConfig:
    """The run of a layout."""
    return load_config(None, [*RUN, *MODELS[layout.model], *layout.overrides])


def statistics(
    config: RunConfig, backend: Backend, groups: ProcessGroups, source: Path | None
) -> tuple[Trainer, list[list[Statistics]]]:
    """Both groups of statistics, by step and layer, and the trainer. Collective over all processes.

    Args:
        config: model and layout.
        backend: the selected backend.
        groups: of the layout.
        source: checkpoint of the weights to start from; None makes them, with routers that overload some experts.
    """
    from sparsecod_megatron.checkpoint.native import load_weights
    from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
    from sparsecod_megatron.metrics.router import RouterGroup
    from sparsecod_megatron.model import unwrap
    from sparsecod_megatron.train.setup import build_trainer

    trainer = build_trainer(config, backend, groups)
    models = [unwrap(model) for model in trainer.models]
    if source is not None:
        load_weights(source, trainer)
    elif config.model.is_moe:
        for layer in models[0].decoder.layers:
            layer.mlp.router.weight.data.mul_(torch.linspace(1, 20, 4)[:, None])
    trainer.optimizer.reload_model_params()
    collectors = [ParameterNormsGroup(models, trainer.optimizer), RouterGroup(models)]
    return trainer, collected_steps(trainer, collectors, steps=STEPS)


def main() -> None:
    """Write the file from rank 0."""
    *sources, output = sys.argv[1:]
    source = {name: Path(path) for name, path in (item.split("=") for item in sources)}
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, output) as collected:
        for layout in ALL_LAYOUTS:
            config = layout_config(layout)
            with process_groups(config) as groups:
                _, collected[layout.name] = statistics(config, backend, groups, source[layout.model])


if __name__ == "__main__":
    main()
