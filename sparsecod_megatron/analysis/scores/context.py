"""What every score is given: the model, its blocks, and a seeded sample of sequences cut to fit the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparsecod_megatron.analysis.tasks.items import Items, without_task
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.hf.blocks import Layers, find_layers
from sparsecod_megatron.hf.calls import Replay, Trace
from sparsecod_megatron.parallel.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = Literal["all", "fit", "held_out"]
MAX_SEQUENCES = 64
"""Sequences of a micro-batch; beyond this a bigger one is not faster."""
LOGIT_COPIES = 3
"""The head's output, its float32 copy a row at a time, and the probabilities made of it."""


@dataclass(frozen=True)
class Context:
    """A loaded model and the sample it is measured on.

    Attributes:
        model: a causal LM in evaluation mode, no parameter requiring gradients.
        layers: its blocks.
        windows: int64 [N, T + 1] on the CPU, in random order: T inputs, each with the next token as its label.
        seed: seed of every random choice.
        memory_gib: what activations of a micro-batch may take.
        reference: also compute the reference's own numbers where they cost extra work.
        processes: those that share the sample; each runs its `places` in every part.
        items: a task's, for scores that ask for answers; None where there is no task.
        token_classes: class → bool [V], whether an id belongs to it, for scores that tell tokens apart.
    """

    model: PreTrainedModel
    layers: Layers
    windows: Tensor
    seed: int
    memory_gib: float = 2.0
    reference: bool = False
    processes: Processes = Processes()
    items: Items | None = None
    token_classes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """N, of all processes together."""
        return len(self.windows)

    @property
    def seq_length(self) -> int:
        """T, inputs of a sequence."""
        return self.windows.shape[1] - 1

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return self.layers.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of weights and computation."""
        return self.model.dtype

    @property
    def replay(self) -> Replay:
        """Runs the model whole or in parts."""
        return Replay(self.model, self.layers)

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU; the same draws each time."""
        return torch.Generator().manual_seed(self.seed)

    def part(self, part: Part) -> Tensor:
        """The windows of a part: all, the first half to fit on, or the other half to score on.

        Raises:
            ConfigError: halves of a sample of one sequence.
        """
        if part == "all":
            return self.windows
        if self.num_sequences < 2:
            raise ConfigError("--samples 1: a score that fits needs one half to fit on and one to score on; give 2")
        half = self.num_sequences // 2
        return self.windows[:half] if part == "fit" else self.windows[half:]

    def own(self, part: Part) -> Tensor:
        """This process's windows of a part."""
        windows = self.part(part)
        return windows[self.processes.places(len(windows))]

    def own_rows(self, rows: Tensor) -> Tensor:
        """This process's part of what has a row for each window."""
        return rows[self.processes.places(len(rows))]

    def items_for(self, score: str) -> Items:
        """The task's items.

        Raises:
            ConfigError: there is no task.
        """
        if self.items is None:
            raise without_task(score)
        return self.items

    def of_items(self, items: Items) -> Context:
        """The same model on a task's items, whose labels are `items.labels` and not the next tokens."""
        return replace(self, windows=items.windows)

    @property
    def micro_batch(self) -> int:
        """Sequences of a pass whose hidden states, logits and block activations fit `memory_gib`."""
        width = self.hidden_size * self.layers.state.columns
        streams = (len(self.layers) + 1 + 16) * width  # every depth kept, and one block at work
        logits = LOGIT_COPIES * self._text.vocab_size
        attention = getattr(self._text, "num_attention_heads", 1) * self.seq_length
        num_bytes = 4 * self.seq_length * (streams + logits + attention)
        return int(max(1, min(MAX_SEQUENCES, self.memory_gib * 2**30 // num_bytes)))

    def batches(self, part: Part, *, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches in the sample's order: tokens [B, T] and labels [B, T], on the CPU.

        Args:
            part: which windows.
            title: title of the progress bar.
        """
        windows = self.own(part)
        with tqdm(total=len(windows), desc=title, unit="seq", leave=False, disable=self.processes.no_progress) as bar:
            for batch in windows.split(self.micro_batch):
                yield batch[:, :-1], batch[:, 1:]
                bar.update(len(batch))

    def traces(self, part: Part, *, title: str) -> Iterator[Trace]:
        """The unchanged model on each of `batches`, one at a time, so that memory does not grow with the sample."""
        replay = self.replay
        for tokens, labels in self.batches(part, title=title):
            yield replay.trace(tokens, labels)

    def traces_with_rows(self, part: Part, *, title: str) -> Iterator[tuple[Trace, slice]]:
        """The same, and which of this process's windows each is of, for what has a row for each (`own_rows`)."""
        first = 0
        for trace in self.traces(part, title=title):
            rows = slice(first, first + len(trace.tokens))
            yield trace, rows
            first = rows.stop

    def collect(self, part: Part, found: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Results of every micro-batch as tensors of all sequences, those of all processes in the sample's order.

        They are filled in place: small tensors kept from batch to batch would lie between the large temporary ones and
        break up the memory that the next batch needs.

        Args:
            part: which windows.
            found: for each of this process's micro-batches, tensors [B, ...] of the same shapes but for B, on the CPU.
        """
        columns: tuple[Tensor, ...] = ()
        filled = 0
        for batch in found:
            columns = columns or tuple(entry.new_empty(len(self.own(part)), *entry.shape[1:]) for entry in batch)
            for column, entry in zip(columns, batch, strict=True):
                column[filled : filled + len(entry)] = entry
            filled += len(batch[0])
        return joined(self.processes.gather([columns]))

    @property
    def _text(self):  # type: ignore[no-untyped-def]  # transformers' configurations are not typed
        return self.model.config.get_text_config()


def make_context(
    model: PreTrainedModel,
    tokens: Tensor | None,
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    memory_gib: float = 2.0,
    reference: bool = False,
    processes: Processes | None = None,
    items: Items | None = None,
    token_classes: Mapping[str, Tensor] | None = None,
) -> Context:
    """Draw the sample and find the blocks.

    The same tokens, sizes and seed always give the same windows, so two models are measured on the same text.

    Args:
        model: a causal LM; set to evaluation mode, and its parameters to need no gradients.
        tokens: int64 [tokens], a stream with at least one window of `seq_length + 1`; None where the items of a task
            are all that is scored, which are the sample then.
        num_samples: windows to draw, without overlap.
        seq_length: inputs of a window.
        seed: seed of the draw and of every later choice.
        memory_gib: what activations of a micro-batch may take.
        reference: also compute the reference's own numbers where they cost extra work.
        processes: which one this is of how many that share the sample; None for a single one.
        items: a task's, for scores that ask for answers.
        token_classes: class → bool [V], ids that belong to it.

    Raises:
        ConfigError: a size below one, more positions than the model has, or more processes than half the windows.
        DataError: too few tokens, or a token id that the model has no row for.
        ConversionError: the model is not a stack of blocks.
    """
    for option, value in (("samples", num_samples), ("seq-length", seq_length)):
        if value < 1:
            raise ConfigError(f"--{option} {value}: must be at least 1")
    processes = processes or Processes()
    if processes.size > max(1, num_samples // 2):
        raise ConfigError(
            f"--nproc {processes.size}: each process needs a sequence of either half of --samples {num_samples}; "
            f"give at least {2 * processes.size} samples"
        )
    if items is not None and processes.size > len(items):
        raise ConfigError(
            f"--nproc {processes.size}: each process needs a question of --task, and there are {len(items)}"
        )
    if memory_gib <= 0:
        raise ConfigError(f"--memory-gib {memory_gib}: must be above 0")
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    lengths = {} if tokens is None else {f"--seq-length {seq_length}": seq_length}
    lengths |= {} if items is None else {f"--task {items.name}: {items.tokens.shape[1]} tokens": items.tokens.shape[1]}
    for option, length in lengths.items():
        if longest is not None and 0 < longest < length:  # some families write -1 for no limit
            raise ConfigError(f"{option}: the model takes at most {longest} (max_position_embeddings)")
    if tokens is not None:
        windows = draw_windows(tokens, num_samples=num_samples, seq_length=seq_length, seed=seed)
    else:
        assert items is not None, "a context needs text or a task"
        windows = items.windows
    largest, smallest = int(windows.max()), int(windows.min())
    if smallest < 0 or largest >= text.vocab_size:
        wrong = largest if largest >= text.vocab_size else smallest
        raise DataError(
            f"token id {wrong} in the data, but the model's vocabulary has {text.vocab_size} entries; tokenise with "
            "this model's tokenizer"
        )
    model.eval().requires_grad_(False)
    layers = find_layers(model)
    return Context(model, layers, windows, seed, memory_gib, reference, processes, items, token_classes or {})


def draw_windows(tokens: Tensor, *, num_samples: int, seq_length: int, seed: int) -> Tensor:
    """Windows [samples, seq_length + 1] at random places of a stream, in random order, none overlapping another.

    Raises:
        DataError: the stream holds fewer.
    """
    length = seq_length + 1
    available = len(tokens) // length
    if available < num_samples:
        raise DataError(
            f"{len(tokens)} tokens hold {available} sequences of {length} tokens, fewer than --samples {num_samples}; "
            "give more text, fewer samples or a shorter --seq-length"
        )
    chosen = np.random.default_rng(seed).permutation(available)[:num_samples]
    return tokens[: available * length].view(available, length)[torch.from_numpy(chosen)].clone()


def joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tuples of tensors, each of some sequences, as one tuple of tensors of all."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
