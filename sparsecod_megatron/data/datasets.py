"""Token files to Megatron's GPTDataset, alone or blended, on one process or many.

Rank 0 builds the sample index and caches it on disk, the others wait at a barrier and read it: `build_datasets` is
collective.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from sparsecod_megatron.data.integrity import check_token_files
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Blend = tuple[list[str], list[float] | None]


class DatasetIdentity:
    """Stands where Megatron expects its tokenizer: GPTDataset needs the end-of-document id and a name for its cache.

    Megatron caches a sample index under a hash of settings and path. The files' sizes and times are made part of it,
    because token files written again under the same path must not be read through the index of the old ones.

    Args:
        tokenizer: of the token files.
        prefixes: of all token files in use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[str]) -> None:
        self.eod = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        states = [Path(prefix + suffix).stat() for prefix in prefixes for suffix in (".idx", ".bin")]
        self.unique_identifiers = OrderedDict(
            eod=self.eod, vocab_size=self.vocab_size, files=[[state.st_size, state.st_mtime_ns] for state in states]
        )


class _Builder(BlendedMegatronDatasetBuilder):
    """Lets blends be built without torch.distributed.

    With a cache directory Megatron's BlendedDataset asks for the rank even when there is none (blended_dataset.py,
    `_build_indices`). Its index costs milliseconds, so a single process builds it in memory.
    """

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:  # noqa: N804
        """Build one dataset, as the parent does."""
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            *args_before, config = args
            args = (*args_before, dataclasses.replace(config, path_to_cache=None))
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


def build_datasets(
    *,
    train_prefix: str | Sequence[str],
    val_prefix: str | Sequence[str] | None,
    seq_length: int,
    train_samples: int,
    val_samples: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path | None,
    reset_position_ids: bool = False,
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """Build the training and validation datasets. Collective: all ranks call it, and each gets both.

    Documents are shuffled, joined and cut into samples; a corpus shorter than `train_samples` is repeated. The order
    depends on the seed, the files, and the number of epochs that `train_samples` takes.

    Args:
        train_prefix: token files without suffix, or several to blend: prefixes, sampled in proportion to their tokens,
            or weights and prefixes alternating (`["0.3", "a", "0.7", "b"]`).
        val_prefix: the same for validation; None builds none.
        seq_length: tokens of a sample.
        train_samples: samples the training dataset must hold at least.
        val_samples: the same for validation; 0 builds none.
        seed: of the shuffles.
        tokenizer: the one that made the token files.
        reset_position_ids: positions start at 0 after every end of document.
        cache_dir: for Megatron's sample indices, shared by all ranks; None is `index_cache` beside the training files.

    Returns:
        Training and validation dataset; an item holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask`
        (float32), each `[seq_length]`.

    Raises:
        DataError: token files that are missing, damaged or too short, or a cache directory that cannot be written.
    """
    sizes = [train_samples, val_samples, 0]
    given = [train_prefix, val_prefix if val_samples else None, None]
    blends = [None if prefix is None else _blend(prefix, seq_length) for prefix in given]
    prefixes = [prefix for blend in blends if blend for prefix in blend[0]]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=blends,
        path_to_cache=str(_writable(cache_dir or Path(prefixes[0]).parent / "index_cache")),
        tokenizer=DatasetIdentity(tokenizer, prefixes),
        reset_position_ids=reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, validation, _ = _Builder(GPTDataset, sizes, lambda: True, config).build()
    return train, validation


def _blend(prefix: str | Sequence[str], seq_length: int) -> Blend:
    """Check the files; weigh them by tokens where no weights are given, or Megatron would stop after one epoch."""
    prefixes, weights = get_blend_from_list([prefix] if isinstance(prefix, str) else list(prefix))
    tokens = [float(check_token_files(path, seq_length).num_tokens) for path in prefixes]
    if len(prefixes) == 1:
        return prefixes, None
    if weights is None:
        weights = tokens
    if min(weights) <= 0:
        raise DataError(f"blend {' '.join(prefix)}: weight {min(weights)}; every weight must be above 0")
    return prefixes, weights


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written ({error.strerror}); set data.cache_dir to one that can"
        ) from error
    return directory
