"""A checkpoint of any layout as one unsharded model in one process, and weights from elsewhere as such a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.effective import effective_config, make_effective
from sparsecod_megatron.checkpoint.manifest import require_undamaged
from sparsecod_megatron.checkpoint.native import load_weights
from sparsecod_megatron.checkpoint.parts import ModelParts
from sparsecod_megatron.checkpoint.paths import resolve_step_dir
from sparsecod_megatron.checkpoint.saver import save_checkpoint
from sparsecod_megatron.checkpoint.state import TrainState, saved_config
from sparsecod_megatron.config import ParallelConfig, PrecisionConfig, RunConfig
from sparsecod_megatron.config.megatron_fields import FUNCTION_FIELDS
from sparsecod_megatron.model import build_model, transformer_config, unwrap
from sparsecod_megatron.model.tokens import all_logits
from sparsecod_megatron.parallel import running_processes


@dataclass(frozen=True)
class WholeModel:
    """One process holding all weights.

    Attributes:
        config: configuration of the run that made the checkpoint, with the layout of one process and fp32 weights.
        model: in evaluation mode, on the backend's device.
        step_dir: the checkpoint.
    """

    config: RunConfig
    model: GPTModel
    step_dir: Path

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] token ids → [B, S, V] logits in fp32, both on the CPU."""
        tokens = tokens.to(next(self.model.parameters()).device)
        return all_logits(self.model, tokens).float().cpu()


@contextlib.contextmanager
def whole_model(path: Path, backend: Backend) -> Iterator[WholeModel]:
    """Load a checkpoint into one process while the block runs. Local: not under torchrun.

    Args:
        path: a run directory or one of its step directories.
        backend: where the model lives; its layers are the reference ones on either.

    Raises:
        CheckpointError: no checkpoint, or one that cannot be read.
    """
    step_dir = resolve_step_dir(path)
    require_undamaged(step_dir, digests=False)
    config = saved_config(step_dir)
    config = replace(single_process(config), megatron=shape_only(config.megatron))
    computed = effective_config(config, step_dir)
    with unsharded(computed, backend) as (models, groups):
        load_weights(step_dir, ModelParts(config=config, groups=groups, models=models))
        make_effective(unwrap(models[0]), config, step_dir)
        yield WholeModel(computed, unwrap(models[0]).eval(), step_dir)


@contextlib.contextmanager
def unsharded(config: RunConfig, backend: Backend) -> Iterator[tuple[list[GPTModel], ProcessGroupCollection]]:
    """A model with fresh weights and reference layers, and groups of this process alone, while the block runs. Local.

    Args:
        config: as `single_process` gives it.
        backend: where the model lives.
    """
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=False)
        yield build_model(config, megatron, groups, device=backend.device, transformer_engine=False), groups


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], config: RunConfig, checkpoints: Path, backend: Backend
) -> Path:
    """A checkpoint of step 0 without optimizer, which starts with the run that trains on it. Local.

    Args:
        tensors: under their names in a single-process GPTModel.
        config: configuration of the run; its layout does not matter to the checkpoint.
        checkpoints: folder to write the step directory into.
        backend: where the model is put together.
    """
    config = single_process(config)
    with unsharded(config, backend) as (models, groups):
        whole = unwrap(models[0])
        own = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
        with torch.no_grad():
            for name, tensor in tensors:
                own[name].copy_(tensor)
        return save_checkpoint(checkpoints, ModelParts(config=config, groups=groups, models=models), state=TrainState())


def single_process(config: RunConfig) -> RunConfig:
    """The same run on one process and in fp32, whose checkpoint every layout and precision loads."""
    batch = replace(config.train, global_batch_size=1, rampup_batch_size=None, micro_batch_size=1)
    parallel, precision = ParallelConfig(), PrecisionConfig(dtype="fp32")
    return replace(config, parallel=parallel, precision=precision, train=batch, megatron={})


def shape_only(megatron: Mapping[str, Any]) -> dict[str, Any]:
    """`megatron:` fields without those that steer memory, speed or communication of training."""
    return {field: value for field, value in megatron.items() if field in FUNCTION_FIELDS}
