"""An opened model with what scores are measured on: windows of a text, a task's items, classes of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsecod_megatron.analysis.scores.context import Context, make_context
from sparsecod_megatron.analysis.tasks.request import TaskRequest, make_items
from sparsecod_megatron.analysis.tasks.text import digit_ids
from sparsecod_megatron.config import DataConfig
from sparsecod_megatron.evaluation.corpus import leading_token, read_corpus
from sparsecod_megatron.models.opening import Opened
from sparsecod_megatron.parallel.processes import Processes


def context_of(
    opened: Opened,
    scores: Sequence[str],
    *,
    model: str,
    text: Path | None,
    task: TaskRequest | None,
    data: DataConfig | None,
    num_samples: int,
    seq_length: int,
    seed: int,
    memory_gib: float,
    reference: bool = False,
    processes: Processes | None = None,
) -> Context:
    """Read text and task, load the model and draw the sample. Collective over the processes.

    Args:
        opened: the model, still open.
        scores: names of what will be measured.
        model: how messages call it.
        text: prefix of token files or a text file; None where every score asks a task.
        task: what is asked; None where no score asks.
        data: data section of the run that the model is from; None where it is from none.
        num_samples: as of `make_context`, like the rest.
        seq_length: tokens.
        seed: of every draw.
        memory_gib: GiB for activations.
        reference: also the reference code's own numbers.
        processes: those that share the sample.

    Raises:
        SparsecodError: text, task or model that cannot be used.
    """
    tokens = None if text is None else read_corpus(text, opened.tokenizer).tokens
    loaded, tokenizer, items = opened.model, opened.tokenizer, None
    if task is not None:
        items = make_items(
            task,
            tokenizer,
            leading=leading_token(tokenizer),
            vocab_size=loaded.config.get_text_config().vocab_size,
            data=data,
            model=model,
        )
    return make_context(
        loaded,
        tokens,
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        memory_gib=memory_gib,
        reference=reference,
        processes=processes,
        items=items,
        token_classes={"digits": digit_ids(tokenizer)} if "token_skip" in scores else {},
    )
