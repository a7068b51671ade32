"""What the loop reads: first checks that data, tokenizer and model fit each other, then micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.config import RunConfig, with_vocab_size
from sparsecod_megatron.config.blend import Blend, parse_blend
from sparsecod_megatron.data.batches import BatchIterator
from sparsecod_megatron.data.datasets import blend_weights, build_dataset
from sparsecod_megatron.data.fingerprint import check_fingerprint, fingerprint_of
from sparsecod_megatron.data.integrity import check_token_files, check_vocabulary
from sparsecod_megatron.data.metadata import split_info
from sparsecod_megatron.data.synthetic.dataset import SyntheticDataset, task_tokenizer
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.data.synthetic.task import task_vocabulary_size
from sparsecod_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from sparsecod_megatron.data.tokenizer_identity import check_made_with
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.ramp import global_batch_size, samples_of_steps
from sparsecod_megatron.train.setup import Trainer

logger = logging.getLogger("sparsecod")

VALIDATION_SEED = 0
"""Shuffles validation text, whatever the run's seed: two runs are compared on the same text."""


def prepare_data(config: RunConfig) -> tuple[RunConfig, PreTrainedTokenizerFast]:
    """Check the token files against model and tokenizer. Local; reads the index files.

    Args:
        config: a checked run.

    Returns:
        The run with the tokenizer's vocabulary size, padded, where it had none; the tokenizer.

    Raises:
        ConfigError: no data configured, or a vocabulary smaller than the tokenizer's.
        DataError: files missing, damaged, too short, of another tokenizer, or with ids beyond the vocabulary.
    """
    data = config.data
    if (task := task_of(data)) is not None:
        needed, given = task_vocabulary_size(task), config.model.vocab_size
        if given is not None and given < needed:
            raise ConfigError(f"model.vocab_size: {given}, but data.synthetic has {needed} ids; leave it out")
        return _with_vocabulary(config, needed), task_tokenizer(task)
    if data.train is None or data.tokenizer is None:
        raise ConfigError("data.prefix: not set; give the PREFIX that `sparsecod data --output PREFIX` wrote")
    prefixes = [*parse_blend("data.train", data.train).prefixes]
    if config.train.eval_interval > 0:
        if data.validation is None:
            raise ConfigError("data.validation: not set; give held-out token files or set train.eval_interval=0")
        prefixes += parse_blend("data.validation", data.validation).prefixes
    for prefix in prefixes:
        check_token_files(prefix, data.seq_length)
    tokenizer = load_tokenizer(data.tokenizer)
    config = _with_vocabulary(config, vocabulary_size(tokenizer))
    assert config.model.vocab_size is not None
    for prefix in prefixes:
        check_vocabulary(prefix, config.model.vocab_size)
        _check_tokenizer(prefix, tokenizer, data.tokenizer)
    return config, tokenizer


def _with_vocabulary(config: RunConfig, needed: int) -> RunConfig:
    """The run with a vocabulary of `needed` entries, padded, where it has none."""
    return with_vocab_size(config, needed) if config.model.vocab_size is None else config


def _check_tokenizer(prefix: str, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    if unchecked := check_made_with(prefix, tokenizer, owner=f"data.tokenizer ({name})"):
        logger.warning(unchecked)
    if (described := split_info(prefix)) and (end := described[0].eod_token_id) != tokenizer.eos_token_id:
        message = f"documents end with id {end}, but the end-of-text token of data.tokenizer ({name}) is"
        raise DataError(f"{prefix}: {message} {tokenizer.eos_token_id}; give the tokenizer that made the files")


class ValidationSource(NamedTuple):
    """One validation corpus: its name in metrics.jsonl, its share of the mean, its samples."""

    name: str
    weight: float
    dataset: Dataset


class RunData:
    """Training and validation micro-batches of one rank.

    Args:
        trainer: its layout decides which samples this rank reads.
        tokenizer: tokenizer of the token files.
        state: where the run is; earlier steps may have had another batch size than this run's.

    Attributes:
        task: whose samples these are; None where they are text.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerFast, state: TrainState) -> None:
        self.trainer = trainer
        train, data = trainer.config.train, trainer.config.data
        self.task = task_of(data)
        left = samples_of_steps(train, train.train_steps - state.step, state.consumed_samples)
        if self.task is not None:
            make = partial(SyntheticDataset, self.task, seq_length=data.seq_length)
            self._train: Dataset = make(seed=train.seed, length=state.consumed_samples + left, held_out=False)
            samples = train.eval_steps * train.global_batch_size
            held_out = make(seed=VALIDATION_SEED, length=samples, held_out=True)
            self._validation = [ValidationSource("answers", 1.0, held_out)]
            return
        blend = parse_blend("data.train", data.train)
        beside = Path(blend.prefixes[0]).parent / "index_cache"
        build = partial(
            build_dataset,
            seq_length=data.seq_length,
            tokenizer=tokenizer,
            cache_dir=Path(data.cache_dir) if data.cache_dir else beside,
            reset_position_ids=data.reset_position_ids,
        )
        self._train = build(blend, seed=train.seed, num_samples=state.consumed_samples + left)
        self._validation = []
        if train.eval_interval > 0:
            blend = parse_blend("data.validation", data.validation)
            for prefix, weight in zip(blend.prefixes, blend_weights(blend), strict=True):
                samples = train.eval_steps * train.global_batch_size
                dataset = build(Blend((prefix,)), seed=VALIDATION_SEED, num_samples=samples)
                self._validation.append(ValidationSource(_short_name(prefix, blend.prefixes), weight, dataset))

    def check_unchanged(self, saved: dict[str, str]) -> dict[str, str]:
        """Compare the training data with those of a checkpoint, and return their fingerprint. Collective.

        Args:
            saved: the checkpoint's fingerprint; empty for a new run.

        Raises:
            DataError: they differ, and `data.allow_changed` is not set.
        """
        config = self.trainer.config
        now = fingerprint_of(config.data, seed=config.train.seed)
        check_fingerprint(saved, now, allow_changed=config.data.allow_changed)
        return now

    def train_batches(self, consumed_samples: int) -> list[Iterator[Batch]]:
        """Micro-batches from `consumed_samples` on, one iterator a model chunk."""
        ramp = partial(global_batch_size, self.trainer.config.train)
        return self._iterators(self._train, consumed_samples, ramp)

    def validation_losses(self, evaluate: Callable[[list[Iterator[Batch]]], float]) -> dict[str, float]:
        """Evaluate every validation source from its start. Collective if `evaluate` is.

        Args:
            evaluate: mean loss of micro-batches, one iterator a model chunk.

        Returns:
            `validation_loss`, the mean by the weights of the blend; of several sources also `validation_loss/NAME`.
        """
        size = self.trainer.config.train.global_batch_size
        losses = [evaluate(self._iterators(source.dataset, 0, lambda _: size)) for source in self._validation]
        mean = sum(source.weight * loss for source, loss in zip(self._validation, losses, strict=True))
        if len(losses) == 1:
            return {"validation_loss": mean}
        names = [f"validation_loss/{source.name}" for source in self._validation]
        return {"validation_loss": mean, **dict(zip(names, losses, strict=True))}

    def validation_answers(self, evaluate: Callable[[list[Iterator[Batch]]], dict[str, float]]) -> dict[str, float]:
        """Evaluate the held-out samples of a synthetic task from the start. Collective if `evaluate` is.

        Args:
            evaluate: what is to be known of the answers in micro-batches, one iterator a model chunk.
        """
        (source,), size = self._validation, self.trainer.config.train.global_batch_size
        return evaluate(self._iterators(source.dataset, 0, lambda _: size))

    def _iterators(
        self, dataset: Dataset, consumed_samples: int, global_batch_size: Callable[[int], int]
    ) -> list[Iterator[Batch]]:
        train, groups = self.trainer.config.train, self.trainer.groups
        return [
            BatchIterator(
                dataset,
                micro_batch_size=train.micro_batch_size,
                global_batch_size=global_batch_size,
                data_parallel_rank=groups.dp.rank(),
                data_parallel_size=groups.dp.size(),
                consumed_samples=consumed_samples,
                num_workers=self.trainer.config.data.num_workers,
            )
            for _ in self.trainer.models
        ]


def _short_name(prefix: str, prefixes: Sequence[str]) -> str:
    """The file name, or the whole prefix where another source has the same."""
    name = Path(prefix).name
    return name if [Path(other).name for other in prefixes].count(name) == 1 else prefix
