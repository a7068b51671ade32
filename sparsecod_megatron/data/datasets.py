"""Token files to samples: Megatron's GPTDataset in blocks of epochs, alone or blended, on one process or many."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import ConcatDataset, Dataset

from sparsecod_megatron.config.blend import Blend
from sparsecod_megatron.data.blend import BlendDataset, BlendTable
from sparsecod_megatron.data.epochs import block_seed, epoch_blocks
from sparsecod_megatron.data.index_cache import CachedGPTDataset, first_process_first
from sparsecod_megatron.data.integrity import check_token_files
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DatasetIdentity:
    """Stands where Megatron expects its tokenizer: GPTDataset needs the end-of-document id and a name for its cache.

    Megatron caches a sample index under a hash of settings and path. The files' sizes and times are made part of it,
    because token files written again under the same path must not be read through the index of the old ones.

    Args:
        tokenizer: tokenizer of the token files.
        prefix: prefix of the token files.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str) -> None:
        self.eod = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        states = [Path(prefix + suffix).stat() for suffix in (".idx", ".bin")]
        self.unique_identifiers = OrderedDict(
            eod=self.eod, vocab_size=self.vocab_size, files=[[state.st_size, state.st_mtime_ns] for state in states]
        )


def blend_weights(blend: Blend) -> tuple[float, ...]:
    """Share of each source, above 0 and with sum 1: the weights given, or else the tokens of the files.

    Raises:
        DataError: token files that are missing or damaged.
    """
    weights = blend.weights or [check_token_files(prefix, 0, entries=False).num_tokens for prefix in blend.prefixes]
    return tuple(weight / sum(weights) for weight in weights)


def build_dataset(
    blend: Blend,
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    reset_position_ids: bool = False,
) -> Dataset:
    """Build a dataset. Collective: all ranks call it, and each gets the same one.

    Documents are shuffled, joined and cut into samples; a corpus that is too short is repeated. The order depends on
    the files, the weights, the seed and `seq_length`; a larger `num_samples` only continues where a smaller one ends.

    Args:
        blend: token files.
        num_samples: to hold at least.
        seq_length: tokens of a sample.
        seed: seed of the shuffles.
        tokenizer: the one that made the token files.
        cache_dir: for Megatron's sample indices, written by the first rank and read by all.
        reset_position_ids: positions start at 0 after every end of document.

    Returns:
        The dataset; an item holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
        `[seq_length]`.

    Raises:
        DataError: token files that are missing, damaged or too short, a share too small, or a cache directory that
            cannot be written or is not shared.
    """
    source = partial(
        _source,
        seq_length=seq_length,
        seed=seed,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        reset_position_ids=reset_position_ids,
    )

    def build() -> Dataset:
        if len(blend.prefixes) == 1:
            return source(blend.prefixes[0], num_samples)
        table = BlendTable(blend_weights(blend))
        counts = table.counts(num_samples)
        sources = [source(prefix, max(1, count)) for prefix, count in zip(blend.prefixes, counts, strict=True)]
        return BlendDataset(sources, table, num_samples)

    return first_process_first(build)


def _source(
    prefix: str,
    num_samples: int,
    *,
    seq_length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    reset_position_ids: bool,
) -> Dataset:
    """Blocks of one corpus."""
    num_tokens = check_token_files(prefix, seq_length, entries=False).num_tokens
    identity = DatasetIdentity(tokenizer, prefix)
    blocks: list[Dataset] = []
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for block, size in enumerate(epoch_blocks(num_tokens, seq_length, num_samples)):
            config = GPTDatasetConfig(
                random_seed=block_seed(seed, block),
                sequence_length=seq_length,
                blend=([prefix], None),
                split="1",
                path_to_cache=str(cache_dir),
                tokenizer=identity,
                reset_position_ids=reset_position_ids,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            tokens = GPTDataset.build_low_level_dataset(prefix, config)
            documents = np.arange(GPTDataset.numel_low_level_dataset(tokens), dtype=np.int32)
            blocks.append(CachedGPTDataset(tokens, prefix, documents, size, Split.train, config))
            assert len(blocks[-1]) == size, f"{prefix}: block {block} has {len(blocks[-1])} samples, not {size}"  # type: ignore[arg-type]
    except FileNotFoundError as error:
        message = "not there on this node; set data.cache_dir to a directory that all nodes share"
        raise DataError(f"{error.filename}: {message}") from error
    except (OSError, ValueError) as error:
        message = f"the sample index cannot be written or read ({error}); set data.cache_dir to another directory"
        raise DataError(f"{cache_dir}: {message}") from error
    return blocks[0] if len(blocks) == 1 else ConcatDataset(blocks)
