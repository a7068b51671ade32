"""What the loop reads: first checks that data, tokenizer and model fit each other, then micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sparsecod_megatron.config import RunConfig, check_config
from sparsecod_megatron.data.batches import BatchIterator
from sparsecod_megatron.data.datasets import build_datasets
from sparsecod_megatron.data.integrity import check_token_files, check_vocabulary
from sparsecod_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.ramp import global_batch_size, samples_of_steps
from sparsecod_megatron.train.setup import Trainer


def prepare_data(config: RunConfig) -> PreTrainedTokenizerFast:
    """Check the token files against model and tokenizer, and fill in the vocabulary size. Local; reads headers only.

    Args:
        config: its model.vocab_size is set if it was None.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: no data configured, or a vocabulary smaller than the tokenizer's.
        DataError: files missing, damaged, too short, or with ids beyond the vocabulary.
    """
    data = config.data
    if data.train is None or data.tokenizer is None:
        raise ConfigError("data.prefix: not set; give the PREFIX that `sparsecod data --output PREFIX` wrote")
    prefixes = [data.train]
    if config.train.eval_interval > 0:
        if data.validation is None:
            raise ConfigError("data.validation: not set; give held-out token files or set train.eval_interval=0")
        prefixes.append(data.validation)
    for prefix in prefixes:
        check_token_files(prefix, data.seq_length)
    tokenizer = load_tokenizer(data.tokenizer)
    if config.model.vocab_size is None:
        config.model.vocab_size = config.model.padded_vocab_size(vocabulary_size(tokenizer))
        check_config(config)
    for prefix in prefixes:
        check_vocabulary(prefix, config.model.vocab_size)
    return tokenizer


class RunData:
    """Training and validation micro-batches of one rank.

    Args:
        trainer: its layout decides which samples this rank reads.
        tokenizer: of the token files.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> None:
        self.trainer = trainer
        config = trainer.config
        train, data = config.train, config.data
        assert data.train is not None, "prepare_data has checked it"
        evaluates = train.eval_interval > 0
        self._train, self._validation = build_datasets(
            train_prefix=data.train,
            val_prefix=data.validation if evaluates else None,
            seq_length=data.seq_length,
            train_samples=samples_of_steps(train, train.train_steps),
            val_samples=train.eval_steps * train.global_batch_size if evaluates else 0,
            seed=train.seed,
            tokenizer=tokenizer,
            reset_position_ids=data.reset_position_ids,
            cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        )

    def train_batches(self, consumed_samples: int) -> list[Iterator[Batch]]:
        """Micro-batches from `consumed_samples` on, one iterator a model chunk."""
        ramp = partial(global_batch_size, self.trainer.config.train)
        return self._iterators(self._train, consumed_samples, ramp)

    def validation_batches(self) -> list[Iterator[Batch]]:
        """Micro-batches of the validation set, always from its start."""
        size = self.trainer.config.train.global_batch_size
        return self._iterators(self._validation, 0, lambda consumed_samples: size)

    def _iterators(
        self, dataset: object, consumed_samples: int, global_batch_size: Callable[[int], int]
    ) -> list[Iterator[Batch]]:
        train, groups = self.trainer.config.train, self.trainer.groups
        return [
            BatchIterator(
                dataset,  # type: ignore[arg-type]
                micro_batch_size=train.micro_batch_size,
                global_batch_size=global_batch_size,
                data_parallel_rank=groups.dp.rank(),
                data_parallel_size=groups.dp.size(),
                consumed_samples=consumed_samples,
                num_workers=self.trainer.config.data.num_workers,
            )
            for _ in self.trainer.models
        ]
