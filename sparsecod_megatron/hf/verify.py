"""A HuggingFace directory against our model: on random tokens, and on what the model itself says.

One of the two is in memory at a time: ours computes first and leaves what it found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families import exported_modules, name_table
from sparsecod_megatron.hf.parity import ParityReport, Recorded, compare_loaded, load_in_fp32
from sparsecod_megatron.hf.table import NameTable
from sparsecod_megatron.hf.witness import megatron_outputs, outside_of_branches, transformers_outputs
from sparsecod_megatron.seams.mechanism import ExportedTensor, Mechanism

PARITY_FILE = "parity.json"
"""What a comparison found, beside the weights."""
LENGTHS = (128, 128, 128, 32, 8, 8)
"""Random tokens compared, at most: a wrong tensor shows on a few. Where a model chooses (experts, the largest
activations), rounding chooses otherwise between two that tie, and what follows the token is far off. That is rare with
few experts and sure with 64 of 1,536 units in 30 layers, so another sequence is drawn, and then shorter ones, until one
is free of it; a wrong tensor fails all. Other models have the first alone."""
GREEDY_LENGTH = 16
"""Tokens compared of what the model itself says, at most, twice the prompt: they cost a forward pass each."""
PROMPT = 8
"""Random tokens before the model's own."""
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
"""Relative change that storing a weight in a type may make: twice its half unit in the last place, for folded ones."""


class Reference(Protocol):
    """A single-process GPTModel in fp32, in evaluation mode."""

    @property
    def model(self) -> nn.Module:
        """The module."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, seq] to [batch, seq, vocab], both on the CPU."""


@dataclass(frozen=True)
class Verification:
    """Reports of both sequences."""

    random: ParityReport
    greedy: ParityReport

    def require(self) -> None:
        """Raise unless both passed.

        Raises:
            ConversionError: as `ParityReport.require`.
        """
        self.random.require()
        self.greedy.require()

    def described(self) -> str:
        """One line for each sequence."""
        return "\n".join(
            f"verified on {report.num_tokens} {name} tokens: max |Δlogit| {report.max_difference:.2e}, rounding of its "
            f"own {report.noise:.2e} (limit {report.tolerance:.2e}), argmax agreement {report.argmax_agreement:.2%}"
            for name, report in (("random", self.random), ("greedy", self.greedy))
        )

    def publish(self, folder: Path) -> None:
        """Write `parity.json` into a folder.

        Raises:
            ConversionError: as `require`.
        """
        self.require()
        content: dict[str, Any] = {
            name: {key: value for key, value in asdict(report).items() if key != "model_dir"}
            | {"tolerance": report.tolerance, "passed": report.passed}
            for name, report in (("random", self.random), ("greedy", self.greedy))
        }
        (folder / PARITY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify_directory(
    reference: Callable[[], AbstractContextManager[Reference]],
    model: ModelConfig,
    hf_dir: Path,
    *,
    mechanisms: Sequence[Mechanism] = (),
    exported_as: torch.dtype | None,
    seq_length: int,
    generator: torch.Generator,
    is_narrower: bool = False,
) -> Verification:
    """Compare a HuggingFace directory with the model of ours that it was made from, or that was made from it. Local.

    Args:
        reference: opens ours; left before the directory's weights are read, so that its memory can be theirs.
        model: its configuration.
        hf_dir: the directory.
        mechanisms: that the model was trained with.
        exported_as: type of an export's weights, to which the reference's are rounded; None for a model that holds the
            directory's numbers.
        seq_length: longest sequence, in tokens.
        generator: generator of the random tokens.
        is_narrower: the directory has fewer neurons or heads, so what modules give inside a branch is not compared.

    Raises:
        ConversionError: a table that does not invert itself, naming the tensor; or weights that do not load.
    """
    assert model.vocab_size is not None
    own = [tensor for module in exported_modules(model, mechanisms).values() for tensor in module.tensors]
    chooses = model.is_moe or any(mechanism.has_choices for mechanism in mechanisms)
    table = None if exported_as is None else name_table(model, mechanisms)
    for length in LENGTHS if chooses else LENGTHS[:1]:
        tokens = torch.randint(model.vocab_size, (1, min(seq_length, length)), generator=generator)
        random, greedy = _recorded(reference, model, tokens, own, table=table, exported_as=exported_as)
        if is_narrower:
            random = replace(random, outputs=outside_of_branches(random.outputs))
        verification = _compared(random, greedy, hf_dir, own)
        if verification.greedy.passed:
            break
    return verification


@torch.no_grad()
def _recorded(
    reference: Callable[[], AbstractContextManager[Reference]],
    model: ModelConfig,
    tokens: Tensor,
    own: Sequence[ExportedTensor],
    *,
    table: NameTable | None,
    exported_as: torch.dtype | None,
) -> tuple[Recorded, Recorded]:
    """What ours gives on the tokens, with what its modules give, and on its own continuation of the first of them."""
    with reference() as ours:
        if table is not None and exported_as is not None:
            shared = ours.model.named_parameters(remove_duplicate=False)
            tensors = {**dict(shared), **dict(ours.model.named_buffers())}
            for name, rounded in as_exported(table, tensors, exported_as):
                tensors[name].copy_(rounded)
        with megatron_outputs(ours.model, model, own) as outputs:
            random = Recorded(tokens, ours.logits(tokens), outputs)
        prompt = tokens[:, : min(PROMPT, -(-tokens.shape[1] // 2))]
        greedy = _greedy(ours.logits, prompt, min(tokens.shape[1], GREEDY_LENGTH))
        return random, Recorded(greedy, ours.logits(greedy), {})


def _compared(random: Recorded, greedy: Recorded, hf_dir: Path, own: Sequence[ExportedTensor]) -> Verification:
    """Both sequences, the second where the first agrees."""
    loaded = load_in_fp32(hf_dir)
    report = compare_loaded(random, loaded, hf_dir, by_module=partial(transformers_outputs, own=own))
    if not report.passed:
        return Verification(report, report)
    return Verification(report, compare_loaded(greedy, loaded, hf_dir))


def as_exported(table: NameTable, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our tensors with the rounding that the export gave them: there in `dtype`, and back in fp32.

    Args:
        table: of the export.
        tensors: by name; others than the model's are left out.
        dtype: number format of the export.

    Raises:
        ConversionError: a tensor does not come back, so the two directions of its entry do not fit.
    """
    for entry in table.entries:
        if not all(tensors[name].is_floating_point() for name in entry.megatron):
            continue  # integers are written as they are
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
