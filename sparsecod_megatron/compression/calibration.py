"""The text of a compression: sequences that a method sees, and a part it never sees, for perplexity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from sparsecod_megatron.errors import ConfigError, DataError


@dataclass(frozen=True)
class Text:
    """Two disjoint parts of one token stream.

    Attributes:
        calibration: int64 `[num_samples, seq_length]`, drawn from the front of the stream.
        held_out: int64 `[num_held_out · seq_length + 1]`, the end of the stream; its first token is context only.
    """

    calibration: torch.Tensor
    held_out: torch.Tensor


def split_text(
    tokens: torch.Tensor, *, num_samples: int, num_held_out: int, seq_length: int, vocab_size: int, seed: int
) -> Text:
    """Cut the end off a stream and draw calibration sequences from the rest, without replacement.

    Args:
        tokens: integer `[tokens]`.
        num_samples: calibration sequences.
        num_held_out: sequences for perplexity.
        seq_length: tokens of a sequence.
        vocab_size: vocabulary size of the model.
        seed: seed of the draw.

    Raises:
        ConfigError: a count below 1.
        DataError: the stream is too short, or holds ids outside the vocabulary.
    """
    for option, value in (("samples", num_samples), ("held-out", num_held_out), ("seq-length", seq_length)):
        if value < 1:
            raise ConfigError(f"--{option} {value}: must be at least 1")
    needed = (num_samples + num_held_out) * seq_length + 1
    if len(tokens) < needed:
        raise DataError(
            f"--data: {len(tokens)} tokens, but --samples {num_samples} and --held-out {num_held_out} sequences of "
            f"--seq-length {seq_length} need {needed}; give more text, or lower one of them"
        )
    if int(tokens.max()) >= vocab_size:
        raise DataError(
            f"--data: token id {int(tokens.max())}, but the model's vocabulary has {vocab_size} entries; tokenise with "
            "this model's tokenizer"
        )
    front, held_out = tokens.split([len(tokens) - num_held_out * seq_length - 1, num_held_out * seq_length + 1])
    windows = front[: len(front) // seq_length * seq_length].view(-1, seq_length)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return Text(calibration=windows[drawn.sort().values], held_out=held_out)


def feeder(sequences: torch.Tensor, batch_size: int) -> Callable[[nn.Module], None]:
    """A function that runs a model over the sequences, the form in which ModelOpt takes calibration data.

    Args:
        sequences: int64 `[sequences, tokens]`.
        batch_size: sequences of a forward pass.
    """

    def feed(model: nn.Module) -> None:
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in tqdm(sequences.split(batch_size), desc="calibration", unit="batch", disable=None):
                model(input_ids=batch.to(device), use_cache=False)

    return feed
