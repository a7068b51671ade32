"""The vocabulary of a run that leaves it to the tokenizer."""

from __future__ import annotations

from pathlib import Path

from sparsecod_megatron.config import RunConfig, with_vocab_size
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.data.synthetic.task import task_vocabulary_size
from sparsecod_megatron.errors import ConfigError, DataError

PAPER_VOCABULARY = 50304
"""Vocabulary of the paper's models: the GPT-NeoX tokenizer, padded."""


def with_vocabulary(config: RunConfig) -> tuple[RunConfig, str | None]:
    """The run with a vocabulary size, and a note on where it is from if the file does not say.

    Raises:
        ConfigError: the layout does not divide it, or the tokenizer that training would take cannot be read.
    """
    if config.model.vocab_size is not None:
        return config, None
    name, task = config.data.tokenizer, task_of(config.data)
    if task is not None:
        size, note = task_vocabulary_size(task), f"vocabulary of data.synthetic.task={config.data.synthetic['task']}"
    elif name is not None:
        if name == f"{config.data.prefix}_tokenizer" and not Path(name).exists():
            fix = "make it with `sparsecod data`, or set model.vocab_size to plan without it"
            raise ConfigError(f"data.prefix: {config.data.prefix}: there is no {name}; {fix}")
        size, note = _vocabulary(name), f"vocabulary of {name}"
    else:
        size, note = PAPER_VOCABULARY, "model.vocab_size is not set and there is no tokenizer: the paper's is assumed"
    completed = with_vocab_size(config, size)
    return completed, f"{note}, {completed.model.vocab_size} entries"


def _vocabulary(name: str) -> int:
    from sparsecod_megatron.data.tokenizer import load_tokenizer, vocabulary_size

    try:
        return vocabulary_size(load_tokenizer(name))
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}; or set model.vocab_size to plan without it") from None
