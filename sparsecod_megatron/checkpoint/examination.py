"""What a checkpoint's files say of themselves, read one tensor at a time: without a model, without process groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sparsecod_megatron.checkpoint.digests import Digests, add_digest, first_difference, tensor_digest
from sparsecod_megatron.checkpoint.invariants import MASTER_KINDS, same_weights
from sparsecod_megatron.checkpoint.manifest import find_damage
from sparsecod_megatron.checkpoint.state import read_state, saved_config
from sparsecod_megatron.checkpoint.stream import OPTIMIZER_PREFIX, CheckpointTensors


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        as_it_should_be: None where there is nothing to compare with.
        text: what was found.
    """

    subject: str
    as_it_should_be: bool | None
    text: str


def examine_files(step_dir: Path) -> Finding:
    """Every file against its SHA-256. Local."""
    damage = find_damage(step_dir, digests=True)
    return Finding("files", damage is None, damage or f"{step_dir.name}: every file has its SHA-256")


def examine_weights(step_dir: Path) -> Finding:
    """The optimizer's fp32 weights, cast to the model's type, against the model's weights. Local.

    Raises:
        DamagedCheckpoint: a tensor cannot be read.
    """
    subject = "fp32 weights"
    if saved_config(step_dir).precision.fp8_param_gather:
        return Finding(subject, None, "the model's weights are FP8, which is not a plain cast")
    with _tensors(step_dir, None) as weights:
        for kind in MASTER_KINDS:
            with _tensors(step_dir, kind) as masters:
                wrong = [
                    name for name in masters if not same_weights(masters[name], weights[name], weights[name].dtype)
                ]
                if wrong:
                    return Finding(subject, False, f"{len(wrong)} of {len(masters)} are not the model's: {wrong[0]}")
                if len(masters):
                    return Finding(subject, True, f"{len(masters)} tensors, cast to the model's type, are the model's")
    return Finding(subject, None, "the optimizer has no fp32 weights")


def examine_moments(step_dir: Path) -> Finding:
    """The optimizer's tensors against the digests of what the ranks stepped of each parameter. Local.

    Raises:
        CheckpointError: state.json or a tensor cannot be read.
    """
    state = read_state(step_dir)
    if state.is_weights_alone:
        return Finding("moments", None, "the checkpoint holds weights alone")
    saved = state.digests
    kinds = sorted({kind for entry in saved.values() for kind in entry})
    if not kinds:
        return Finding("moments", None, "saved without digests by an earlier version")
    found: Digests = {}
    for kind in kinds:
        with _tensors(step_dir, kind) as tensors:
            for name, place in tensors.places.items():
                key = place.key.removeprefix(OPTIMIZER_PREFIX.format(kind))
                add_digest(found, replace(place, key=key), kind, int(tensor_digest(tensors[name])))
    if moved := first_difference(saved, found):
        return Finding("moments", False, f"{moved} is not what the ranks stepped")
    return Finding("moments", True, f"{', '.join(kinds)} of {len(saved)} parameters are what the ranks stepped")


@contextmanager
def _tensors(step_dir: Path, kind: str | None) -> Iterator[CheckpointTensors]:
    with ExitStack() as files:
        yield CheckpointTensors(step_dir, files, kind)
