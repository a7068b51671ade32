"""`--verify`: the exported directory against the training model, on random tokens and on what the model itself says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families import choose_family
from sparsecod_megatron.hf.parity import ParityReport, compare_logits
from sparsecod_megatron.hf.witness import megatron_outputs

BATCH, PROMPT = 4, 8
"""Sequences compared, and random tokens before the model's own."""
RANDOM_LENGTH, GREEDY_LENGTH = 256, 32
"""Tokens of a sequence of either batch, at most; greedy ones cost a forward pass each."""
TOLERANCE = 1e-4
"""On logits, both sides in fp32 on the numbers that the files hold."""
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
"""Relative change that storing a weight in a type may make: twice its half unit in the last place, for folded ones."""


@dataclass(frozen=True)
class Verification:
    """Reports of both batches."""

    random: ParityReport
    greedy: ParityReport

    def require(self) -> None:
        """Raise unless both passed.

        Raises:
            ConversionError: as `ParityReport.require`.
        """
        self.random.require()
        self.greedy.require()


@torch.no_grad()
def verify_export(
    reference: nn.Module,
    logits: Callable[[Tensor], Tensor],
    model: ModelConfig,
    hf_dir: Path,
    *,
    dtype: torch.dtype,
    seq_length: int,
    generator: torch.Generator,
) -> Verification:
    """Compare an export with the model that it was made from. Local.

    Args:
        reference: single-process GPTModel in fp32 with the checkpoint's weights; they are rounded to `dtype`.
        logits: its forward pass, tokens `[batch, seq]` to logits `[batch, seq, vocab]`, both on CPU.
        model: its configuration.
        hf_dir: the export.
        dtype: of the export's weights.
        seq_length: longest sequence, in tokens.
        generator: of the random tokens.

    Raises:
        ConversionError: a table that does not invert itself, naming the tensor; or weights that do not load.
    """
    assert model.vocab_size is not None
    own = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    for name, rounded in as_exported(model, own, dtype):
        own[name].copy_(rounded)
    random = torch.randint(model.vocab_size, (BATCH, min(seq_length, RANDOM_LENGTH)), generator=generator)

    def compare(tokens: Tensor) -> ParityReport:
        return compare_logits(
            logits,
            hf_dir,
            tokens=tokens,
            tolerance=TOLERANCE,
            reference_outputs=lambda: megatron_outputs(reference, model),
        )

    report = compare(random)
    if not report.passed:
        return Verification(report, report)
    return Verification(report, compare(_greedy(logits, random[:, :PROMPT], min(seq_length, GREEDY_LENGTH))))


def as_exported(model: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our tensors with the rounding that the export gave them: there in `dtype`, and back in fp32.

    Args:
        model: ours.
        tensors: by name; others than the model's are left out.
        dtype: of the export.

    Raises:
        ConversionError: a tensor does not come back, so the two directions of its entry do not fit.
    """
    for entry in choose_family(model).table(model).entries:
        group = [tensors[name].float() for name in entry.megatron]
        there = [tensor.to(dtype).float() for tensor in entry.transform.to_hf(group)]
        back = entry.transform.to_megatron(there) if group else ()
        for name, before, after in zip(entry.megatron, group, back, strict=True):
            slack = ROUNDING[dtype] * before.abs() + torch.finfo(dtype).tiny
            if before.shape != after.shape or bool(((before - after).abs() > slack).any()):
                raise ConversionError(
                    f"{name}: what is written as {', '.join(entry.hf)} does not read back as the same numbers; "
                    "do not use this export, its name table is broken"
                )
            yield name, after


def _greedy(logits: Callable[[Tensor], Tensor], prompt: Tensor, length: int) -> Tensor:
    """The prompts and the model's own continuation, [batch, length]."""
    tokens = prompt
    while tokens.shape[1] < length:
        tokens = torch.cat((tokens, logits(tokens)[:, -1:].argmax(-1).to(tokens.device)), dim=1)
    return tokens
