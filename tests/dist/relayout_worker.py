"""Loads one checkpoint into each layout of as many ranks in turn and saves it from there.

Arguments: the source checkpoint of each model as dense=DIR moe=DIR, then the folder to write to.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.checkpoint.native import load_checkpoint
from sparsecod_megatron.checkpoint.paths import resolve_step_dir
from sparsecod_megatron.checkpoint.saver import save_checkpoint
from sparsecod_megatron.config import load_config
from sparsecod_megatron.parallel import process_groups, world
from tests.dist.layouts import LARGE_LAYOUTS, LAYOUTS


def main() -> None:
    """Write FOLDER/<layout>/step_… for every layout of this many ranks."""
    *sources, folder = sys.argv[1:]
    source = {name: resolve_step_dir(Path(path)) for name, path in (item.split("=") for item in sources)}
    backend = select_backend()
    from sparsecod_megatron.train.setup import build_trainer

    with world(communication=backend.communication):
        for layout in [*LAYOUTS, *LARGE_LAYOUTS]:
            if layout.nproc != dist.get_world_size():
                continue
            config = load_config(
                source[layout.model] / "config.yaml", [*layout.overrides, "train.global_batch_size=16"]
            )
            # Other fresh weights than the source's, so that what is saved can only come from the load.
            config = replace(config, train=replace(config.train, seed=7))
            with process_groups(config) as groups:
                trainer = build_trainer(config, backend, groups)
                state = load_checkpoint(source[layout.model], trainer)
                save_checkpoint(Path(folder) / layout.name, trainer, state=state)
            dist.barrier()


if __name__ == "__main__":
    main()
