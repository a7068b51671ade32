"""A new run from the weights of one whose optimizer does not belong to them, with fresh fp32 weights and moments."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.first_rank import on_first_rank
from sparsecod_megatron.checkpoint.native import start_from_weights
from sparsecod_megatron.checkpoint.saver import save_checkpoint
from sparsecod_megatron.checkpoint.state import read_state
from sparsecod_megatron.config import RunConfig, load_config, save_config
from sparsecod_megatron.config.run_files import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    LINEAGE_FILE,
    METRICS_FILE,
    STATISTICS_FILE,
    TOKENIZER_DIR,
    VERSIONS_FILE,
)
from sparsecod_megatron.files import making_output
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS
from sparsecod_megatron.parallel import running_processes
from sparsecod_megatron.train.setup import build_trainer

_FILES_KEPT = (METRICS_FILE, STATISTICS_FILE, VERSIONS_FILE, LINEAGE_FILE, TOKENIZER_DIR)
"""What of the old run the new one continues."""


def repair(run_dir: Path, step_dir: Path, output: Path, config: RunConfig, backend: Backend) -> None:
    """Write the new run. Collective: every process of the layout calls it.

    Progress, schedule and place in the data are kept; Adam counts its steps from 0, as its moments do.

    Args:
        run_dir: the old run.
        step_dir: its checkpoint to start from.
        output: the new run directory, which must not be there or be empty.
        config: with the layout to do it in.
        backend: the selected backend.

    Raises:
        ConversionError: `output` is in use.
        CheckpointError: damaged, or it cannot be written.
    """
    saved = read_state(step_dir)
    with (
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
        ExitStack() as making,
    ):
        folder = on_first_rank(lambda: making.enter_context(making_output(output)))
        trainer = build_trainer(config, backend, groups)
        start_from_weights(step_dir, trainer)
        trainer.scheduler.load_state_dict(saved.scheduler)
        state = replace(saved.train, optimizer_steps=0)
        save_checkpoint(folder / CHECKPOINTS_DIR, trainer, state=state)
        if dist.get_rank() == 0:
            _copy_history(run_dir, folder, output)


def _copy_history(run_dir: Path, folder: Path, output: Path) -> None:
    config = load_config(run_dir / CONFIG_FILE, mechanisms=SAVED_MECHANISMS)
    config.logging.run_dir = str(output)
    save_config(config, folder / CONFIG_FILE)
    for source in (run_dir / name for name in _FILES_KEPT):
        if source.is_dir():
            shutil.copytree(source, folder / source.name)
        elif source.exists():
            shutil.copy(source, folder / source.name)
