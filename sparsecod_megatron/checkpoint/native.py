"""What a checkpoint holds and how it is loaded: weights and optimizer, sharded by Megatron-Core, and state.json.

Only the optimizer's tensors are stored (`optimizer_state.py`); its parameter groups are rebuilt by the run that loads.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sparsecod_megatron.checkpoint.added_modules import AddedModules
from sparsecod_megatron.checkpoint.fp8_state import (
    check_scales,
    is_extra_state,
    model_state_to_keep,
    without_absent_scales,
)
from sparsecod_megatron.checkpoint.invariants import require_digests, require_own_masters
from sparsecod_megatron.checkpoint.manifest import DamagedCheckpoint, check_files
from sparsecod_megatron.checkpoint.mechanism_state import (
    check_meaning,
    plugin_state,
    plugins_to_restore,
    restore_plugins,
)
from sparsecod_megatron.checkpoint.optimizer_state import optimizer_tensors, set_optimizer_tensors
from sparsecod_megatron.checkpoint.parts import ModelParts, TrainingParts
from sparsecod_megatron.checkpoint.random_states import restore_random_states
from sparsecod_megatron.checkpoint.sharded import pieces, sharded_leaves
from sparsecod_megatron.checkpoint.state import TrainState, check_same_model, layout_of, read_state, saved_config
from sparsecod_megatron.checkpoint.stream import NOT_WEIGHTS, stored_metadata
from sparsecod_megatron.checkpoint.untrusted import read_metadata, tensors_only
from sparsecod_megatron.config.model_keys import model_differences
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.model import unwrap
from sparsecod_megatron.parallel.weights import gather_weights
from sparsecod_megatron.seams.plugin import Plugin

logger = logging.getLogger("sparsecod")


def sharded_state(parts: ModelParts) -> ShardedStateDict:
    """This rank's part of weights and, in training, optimizer and mechanisms' state, to be saved.

    Collective over all processes.
    """
    gather_weights(parts.models)
    weights = model_sharded_state(parts.models, parts.groups)
    if not isinstance(parts, TrainingParts):
        return weights
    sharded = weights | plugin_state(parts.plugins, weights)
    # Data-parallel rank 0 has gathered the others' parts; they write none.
    tensors = optimizer_tensors(parts.optimizer, weights, metadata=_metadata(parts.groups), is_loading=False)
    tensors = {index: part for index, part in tensors.items() if part}
    return sharded | ({"optimizer": tensors} if tensors else {})


def load_latest(candidates: Sequence[Path], parts: TrainingParts) -> TrainState:
    """Continue from the first of `candidates` that is not damaged. Collective over all processes.

    Args:
        candidates: step directories, the preferred one first (`paths.resume_candidates`).
        parts: of the run, whose configuration must describe the same model.

    Raises:
        CheckpointError: all are damaged, or one is of another model.
    """
    damages: list[str] = []
    for directory in candidates:
        try:
            state = load_checkpoint(directory, parts)
        except DamagedCheckpoint as damage:
            damages.append(str(damage).removesuffix("; choose another step"))
            continue
        if damages:
            logger.warning("%s; using %s instead", "; ".join(damages), directory.name)
        return state
    raise CheckpointError(
        f"none of {len(candidates)} checkpoints can be used: {damages[0]}; restore its files, or start afresh in "
        "another logging.run_dir"
    )


def load_checkpoint(directory: Path, parts: TrainingParts) -> TrainState:
    """Continue from a checkpoint of any layout. Collective over all processes.

    Args:
        directory: a step directory.
        parts: of the run, whose configuration must describe the same model.

    Returns:
        Progress at that step. Under the same layout random states are restored too, and the run continues bit for bit.

    Raises:
        DamagedCheckpoint: incomplete, or not as it was written.
        CheckpointError: it is of another model or version, or its optimizer does not belong to its weights.
    """
    config, models, optimizer, groups = parts.config, parts.models, parts.optimizer, parts.groups
    check_files(directory, digests=config.checkpoint.verify)
    saved, theirs = read_state(directory), saved_config(directory)
    check_same_model(theirs, config, directory)
    if saved.is_weights_alone:
        start_from_weights(directory, parts)
        return saved.train
    model_state = model_sharded_state(models, groups)
    tensors = optimizer_tensors(optimizer, model_state, metadata=_metadata(groups), is_loading=True)
    sharded = model_state | plugin_state(parts.plugins, model_state) | {"optimizer": tensors}
    loaded, metadata = _load(sharded, directory)
    if not (config.precision.fp8_param_gather or theirs.precision.fp8_param_gather):
        require_own_masters(directory, sharded, loaded, metadata)
    _set_model_state(models, loaded, directory)
    set_optimizer_tensors(optimizer, loaded["optimizer"], saved.train.optimizer_steps)
    restore_plugins(parts.plugins, loaded)
    for plugin in parts.plugins:
        plugin.weights_replaced()
    # Loading has taken the tensors out of the sharded state.
    require_digests(directory, optimizer, model_sharded_state(models, groups), saved.digests)
    try:
        if saved.layout != layout_of(config.parallel):
            logger.info("%s: saved under another layout, so random states start from train.seed", directory)
        elif not restore_random_states(saved.random_states):
            logger.info("%s: saved on another kind of device, so random states start from train.seed", directory)
        parts.scheduler.num_steps = 0  # loading adds the checkpoint's to them
        parts.scheduler.load_state_dict(saved.scheduler)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(directory, error) from error
    return saved.train


def start_from_weights(directory: Path, parts: TrainingParts, *, densify: bool = False) -> None:
    """Take weights and mechanisms' state; optimizer and schedule start afresh. Collective over all processes.

    A mechanism of which the checkpoint keeps nothing starts on these weights as it would on fresh ones.

    Args:
        directory: a step directory.
        parts: of the run.
        densify: leave mechanisms' state behind: masks are drawn afresh, and without the mechanism every weight trains.

    Raises:
        DamagedCheckpoint: incomplete, or not as it was written.
        CheckpointError: as `load_weights`, or it keeps a mechanism's state that this run would lose.
    """
    kept = [] if densify else plugins_to_restore(directory, parts)
    load_weights(directory, parts, plugins=kept)
    parts.optimizer.reload_model_params()
    for plugin in parts.plugins:
        plugin.weights_replaced()


def load_weights(directory: Path, parts: ModelParts, *, plugins: Sequence[Plugin] = ()) -> None:
    """Load the weights alone, whose tensors must be the model's; what it computes with them may differ. Collective.

    Args:
        directory: a step directory.
        parts: of the run; an optimizer is left as it is.
        plugins: whose state the checkpoint keeps and is loaded too.

    Raises:
        DamagedCheckpoint: incomplete, or not as it was written.
        CheckpointError: it is of another version, has other tensors, or a mechanism gives them another meaning.
    """
    config = parts.config
    check_files(directory, digests=config.checkpoint.verify)
    read_state(directory)
    saved = saved_config(directory)
    check_meaning(saved, config, directory)
    added = AddedModules(saved, config)
    added.stack_layers_as_saved(parts.models)
    sharded = added.left_out(model_sharded_state(parts.models, parts.groups))
    added.stack_layers_as_saved(parts.models, undo=True)
    differences = [difference.described for difference in model_differences(saved, config)]
    _check_tensors(sharded, directory, reason=", ".join(differences))
    for difference in differences:
        logger.info("%s: %s", directory, difference)
    loaded, _ = _load(sharded | plugin_state(plugins, sharded), directory)
    _set_model_state(parts.models, loaded, directory, added)
    restore_plugins(plugins, loaded)


def _check_tensors(sharded: ShardedStateDict, directory: Path, *, reason: str) -> None:
    """Refuse a checkpoint whose weights are not those of this model, by name and shape. Collective over all processes.

    Args:
        sharded: this rank's part of the model.
        directory: a step directory.
        reason: where the configurations differ, for the message.

    Raises:
        CheckpointError: names the first that differs.
        DamagedCheckpoint: the list of its tensors cannot be read.
    """
    here = {tensor.key: tuple(tensor.global_shape) for _, leaf in sharded_leaves(sharded) for tensor in pieces(leaf)}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, here)
    ours = {key: shape for part in ranks for key, shape in part.items()}
    stored = stored_metadata(directory).state_dict_metadata
    tensors = {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    theirs = {key: shape for key, shape in tensors.items() if not key.startswith(NOT_WEIGHTS)}
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            shapes = [list(found[key]) if key in found else "absent" for found in (theirs, ours)]
            raise CheckpointError(
                f"{directory}: weights of another model: {key} is {shapes[0]} there and {shapes[1]} here "
                f"({reason or 'configurations agree'}); use that model, or another checkpoint"
            )


def _load(sharded: ShardedStateDict, directory: Path) -> tuple[dict[str, Any], Metadata]:
    try:
        metadata = read_metadata(directory)  # first, so that what unpickles it below meets nothing unexpected
        with tensors_only():
            return dist_checkpointing.load(without_absent_scales(sharded, metadata), str(directory)), metadata
    except CheckpointException as failures:
        # torch's own, which is not an Exception: what went wrong on each rank.
        error: BaseException = next(iter(failures.failures.values()))[0]
    except (
        *(CheckpointingException, pickle.UnpicklingError, OSError, EOFError, RuntimeError),
        *(LookupError, TypeError, ValueError, AttributeError, AssertionError),
    ) as problem:
        error = problem
    raise _damaged(directory, error) from error


def _damaged(directory: Path, error: BaseException) -> DamagedCheckpoint:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return DamagedCheckpoint(f"{directory}: cannot be loaded ({reason}); choose another step")


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How tensors are written: by parameter, so that every layout can read them.

    Source: Megatron-Core optimizer/distrib_optimizer.py, `sharded_state_dict`; the default format cannot be loaded,
    `dp_reshardable` only under the same model-parallel layout.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }


def _chunk_names(models: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]


def model_sharded_state(models: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> ShardedStateDict:
    """Where this rank's tensors lie in the whole model: weights, buffers that are kept, and FP8 scales. Local."""
    metadata = _metadata(groups)
    chunks = map(unwrap, models)
    return {
        name: model_state_to_keep(model, model.sharded_state_dict(metadata=metadata))
        for name, model in zip(_chunk_names(models), chunks, strict=True)
    }


def _set_model_state(
    models: Sequence[torch.nn.Module], loaded: dict[str, Any], directory: Path, added: AddedModules | None = None
) -> None:
    for name, model in zip(_chunk_names(models), models, strict=True):
        with tensors_only():
            try:
                check_scales(loaded[name])
            except pickle.UnpicklingError as error:
                raise _damaged(directory, error) from error
            found = unwrap(model).load_state_dict(loaded[name], strict=False)
        wrong = [key for key in (*found.missing_keys, *found.unexpected_keys) if not is_extra_state(key)]
        wrong = [key for key in wrong if added is None or not added.hold(key)]
        assert not wrong, f"{directory}: loaded other tensors than the model's: {wrong[:3]}"
