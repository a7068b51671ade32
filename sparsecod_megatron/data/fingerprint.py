"""What a run was trained on, in a few strings that a checkpoint keeps, so that resuming on other data is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from sparsecod_megatron.config import DataConfig
from sparsecod_megatron.config.blend import Blend, parse_blend
from sparsecod_megatron.data.datasets import blend_weights
from sparsecod_megatron.data.index_cache import first_process_first, is_first_process
from sparsecod_megatron.data.synthetic.dataset import synthetic_fingerprint
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.errors import DataError

_STRETCHES = 64
_STRETCH_BYTES = 1 << 16


def fingerprint_of(data: DataConfig, *, seed: int) -> dict[str, str]:
    """Everything that decides which samples a run trains on, whichever kind they are. Collective.

    Args:
        data: of a checked run.
        seed: `train.seed`.

    Raises:
        DataError: token files that cannot be read.
    """
    if (task := task_of(data)) is not None:
        return synthetic_fingerprint(task, seq_length=data.seq_length, seed=seed)
    return fingerprint(parse_blend("data.train", data.train), seq_length=data.seq_length, seed=seed)


def fingerprint(blend: Blend, *, seq_length: int, seed: int) -> dict[str, str]:
    """Everything that decides which tokens come when. Collective; the first rank reads.

    Token files are known by their content, not by their path: the whole of the `.idx` file, and of the `.bin` file its
    size and 64 stretches of 64 KiB, the first and the last among them.

    Args:
        blend: blend of the training data.
        seq_length: tokens of a sample.
        seed: seed of the shuffles.

    Raises:
        DataError: token files that cannot be read.
    """

    def read() -> dict[str, str]:
        entries = {
            "data.seq_length": str(seq_length),
            "train.seed": str(seed),
            "number of sources": str(len(blend.prefixes)),
        }
        for index, (prefix, weight) in enumerate(zip(blend.prefixes, blend_weights(blend), strict=True), start=1):
            entries[f"weight of source {index}"] = f"{weight:.9g}"
            entries[f"index of source {index}"] = _digest(Path(f"{prefix}.idx"), sampled=False)
            entries[f"tokens of source {index}"] = _digest(Path(f"{prefix}.bin"), sampled=True)
        return entries

    result: list[dict[str, str]] = [first_process_first(read if is_first_process() else dict)]
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], *, allow_changed: bool) -> None:
    """Refuse to resume with other data than before. Local.

    Args:
        saved: from the checkpoint; empty where none was taken, and then nothing is checked.
        now: fingerprint of this run.
        allow_changed: the user wants it.

    Raises:
        DataError: the first entry that differs.
    """
    if allow_changed or not saved:
        return
    for name in {**now, **saved}:
        before, here = saved.get(name, "absent"), now.get(name, "absent")
        if before != here:
            raise DataError(
                f"data.train: changed since the checkpoint ({name}: {before} there, {here} here); train on the same "
                "data, or set data.allow_changed=true"
            )


def _digest(path: Path, *, sampled: bool) -> str:
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            starts = list(range(0, size, _STRETCH_BYTES))
            if sampled and len(starts) > _STRETCHES:
                starts = [index * (size - _STRETCH_BYTES) // (_STRETCHES - 1) for index in range(_STRETCHES)]
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(_STRETCH_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    return f"{size} bytes {digest.hexdigest()[:16]}"
