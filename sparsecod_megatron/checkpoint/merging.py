"""The weighted mean of checkpoints of one run, by coefficients of `decay_curves.py`: which may be averaged, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from sparsecod_megatron.checkpoint.invariants import MASTER_KINDS
from sparsecod_megatron.checkpoint.manifest import require_undamaged
from sparsecod_megatron.checkpoint.mechanism_state import mechanisms_with_state
from sparsecod_megatron.checkpoint.paths import resolve_step_dir, step_dirs
from sparsecod_megatron.checkpoint.state import saved_config
from sparsecod_megatron.checkpoint.stream import CheckpointTensors
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.model_keys import model_differences
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
from sparsecod_megatron.errors import CheckpointError

BIAS_SUFFIX = ".router.expert_bias"
"""The experts' selection bias follows the load, not the learning rate: the last checkpoint's is taken."""


def chosen_steps(paths: Sequence[Path], last: int | None) -> list[Path]:
    """The step directories that a user means, oldest first. Local.

    Args:
        paths: step directories, or one run directory.
        last: of the run, how many of its checkpoints; None with step directories.

    Raises:
        CheckpointError: fewer than two.
    """
    found = [resolve_step_dir(path) for path in paths]
    if last is not None:
        if len(paths) > 1:
            raise CheckpointError(f"--last {last}: of one run, but {len(paths)} paths are given; give one")
        found = [*step_dirs(found[0].parent).values()][-last:]
        if len(found) < last:
            raise CheckpointError(
                f"{paths[0]}: has {len(found)} checkpoints in {CHECKPOINTS_DIR}/, but --last is {last}; lower it, or "
                "train with a smaller checkpoint.save_interval and a larger checkpoint.keep_last"
            )
    if len(found) < 2 or len({*found}) < len(found):
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{paths[0]}: a mean needs at least two different checkpoints, not {names}; see --last")
    return found


def mergeable_config(steps: Sequence[Path]) -> RunConfig:
    """The configuration of the last of them. Local.

    Raises:
        CheckpointError: they are of different models, or hold state whose mean means nothing.
    """
    for step in steps:
        require_undamaged(step, digests=True)
    configs = [saved_config(step) for step in steps]
    for step, config in zip(steps, configs, strict=True):
        if difference := next(iter(model_differences(config, configs[-1])), None):
            raise CheckpointError(f"{step}: {difference.described} ({steps[-1]}); merge checkpoints of one model")
        if kept := mechanisms_with_state(step):
            raise CheckpointError(
                f"{step}: mechanisms.{kept[0]} keeps masks there, which a mean would undo; merge checkpoints of "
                "runs without it"
            )
    return configs[-1]


def merged_tensors(steps: Sequence[Path], weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in a single-process GPTModel: the mean of fp32 weights, taken in fp64. Local.

    Args:
        steps: checkpoints of one model, oldest first.
        weights: a coefficient each.
    """
    with ExitStack() as files:
        sources = [_FinestWeights(step, files) for step in steps]
        for name in sources[-1]:
            newest = sources[-1][name]
            if name.endswith(BIAS_SUFFIX) or not newest.is_floating_point():
                yield name, newest
                continue
            mean = torch.zeros_like(newest, dtype=torch.float64)
            for source, weight in zip(sources, weights, strict=True):
                mean.add_(source[name].double(), alpha=weight)
            yield name, mean.float()


class _FinestWeights(Mapping[str, Tensor]):
    """The fp32 weight of each parameter where the optimizer has one, the model's otherwise."""

    def __init__(self, step_dir: Path, files: ExitStack) -> None:
        self._own = CheckpointTensors(step_dir, files)
        self._masters = [CheckpointTensors(step_dir, files, kind) for kind in MASTER_KINDS]

    def __getitem__(self, name: str) -> Tensor:
        return next((masters[name] for masters in self._masters if name in masters.places), self._own[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
