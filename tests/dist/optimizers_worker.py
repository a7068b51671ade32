"""Continues one checkpoint, optimizer state and all, in each layout, after saving it again.

Arguments: the checkpoint of each run as NAME=DIR, then the folder to write to: LAYOUT/step_… and RANKS.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import CP2, EP2, ETP1, PP2, SP, TP2, VPP2, Layout
from tests.helpers.megatron import SMALL
from tests.helpers.training import trainer_batches

if TYPE_CHECKING:
    from sparsecod_megatron.parallel import ProcessGroups

STEPS = 3
RUN = (
    *SMALL,
    "model.num_layers=4",
    "model.qk_norm=true",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.train_steps=20",
    "optimizer.lr=1e-2",
    # Of the order of the gradient: with Adam's usual one, an element whose gradients are rounding noise moves with the
    # sign of the noise.
    "optimizer.adam_eps=1e-3",
    "optimizer.no_weight_decay=[norms,router]",
)
MOE = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_shared_expert_intermediate_size=24",
    "model.moe_first_k_dense_layers=2",
)
MUON = "optimizer.optimizer=muon"
MODELS = {"dense": (MUON,), "moe": (MUON, *MOE), "mup": ("model.mup_base_hidden_size=8", *MOE)}
LAYOUTS = [
    Layout("dp2", "dense", 2, ()),
    Layout("tp2-distributed", "dense", 2, (TP2, "optimizer.muon_tp_mode=distributed")),
    Layout("pp2-vpp2", "dense", 2, (PP2, VPP2)),
    Layout("cp2", "dense", 2, (CP2,)),
    Layout("ep2", "moe", 2, (EP2,)),
    Layout("tp2-ep2-etp1", "moe", 2, (TP2, SP, EP2, ETP1)),
    Layout("mup-ep2", "mup", 2, (EP2,)),
    Layout("dp2-tp2-sp", "dense", 4, (TP2, SP)),
    Layout("tp2-ep2", "moe", 4, (TP2, SP, EP2)),
    Layout("pp2-ep2", "moe", 4, (PP2, EP2)),
]
BLOCKWISE = Layout("tp2-blockwise", "dense", 2, (TP2, "optimizer.muon_tp_mode=blockwise"))


def layout_config(layout: Layout) -> RunConfig:
    """The run of a layout, with other fresh weights than the checkpoint's."""
    return load_config(None, [*RUN, *MODELS[layout.model], *layout.overrides, "train.seed=7"])


def continued(
    config: RunConfig, backend: Backend, groups: ProcessGroups, source: Path, copy: Path | None = None
) -> list[dict[str, Any]]:
    """Loss, gradient norm and parameter norms of the steps that follow a checkpoint. Collective over all processes.

    Args:
        config: model and layout.
        backend: the selected backend.
        groups: of the layout.
        source: the checkpoint.
        copy: where to save it again from this layout; None does not.
    """
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.metrics import StatisticsCollector
    from sparsecod_megatron.metrics.parameter_norms import ParameterNormsGroup
    from sparsecod_megatron.model import unwrap
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    trainer = build_trainer(config, backend, groups)
    state = load_checkpoint(source, trainer)
    if copy is not None:
        save_checkpoint(copy, trainer, state=state)
    group = ParameterNormsGroup([unwrap(model) for model in trainer.models], trainer.optimizer)
    collector = StatisticsCollector(
        {"norms": group}, {"norms": 1}, num_layers=config.model.num_layers, device=backend.device
    )
    data = trainer_batches(trainer, seed=1)
    records = []
    for step in range(1, STEPS + 1):
        result = train_step(trainer, data, observing=collector.collecting(step))
        records.append({"loss": result.loss, "grad_norm": result.grad_norm, "layers": collector.reduce(step)})
    return records


def main() -> None:
    """Write the files."""
    *sources, folder = sys.argv[1:]
    source = {name: Path(path) for name, path in (item.split("=") for item in sources)}
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups, world

    collected = {}
    with world(communication=backend.communication):
        for layout in [*LAYOUTS, BLOCKWISE]:
            if layout.nproc != dist.get_world_size():
                continue
            config = layout_config(layout)
            with process_groups(config) as groups:
                copy = Path(folder) / layout.name
                collected[layout.name] = continued(config, backend, groups, source[layout.model], copy)
        if dist.get_rank() == 0:
            Path(folder, f"{dist.get_world_size()}.json").write_text(json.dumps(collected))


if __name__ == "__main__":
    main()
