"""The gate of every conversion: the HuggingFace model, loaded as a user loads it, gives the logits of ours.

Equal models in fp32 are as far apart as rounding takes them, which depends on depth, on the size of the logits and on
massive channels: 3e-4 in one model and 1e-6 in another. So the HuggingFace model runs in float64 too, and its own fp32
passes say how much rounding there is (`rounding.py`); ours may be a small multiple of that away. So may every module's
output on a few tokens, because a wrong tensor may hardly move the logits of a deep model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.expert_modules import avoid_unaligned_products
from sparsecod_megatron.hf.families import names_in
from sparsecod_megatron.hf.float64 import computing_in_float64
from sparsecod_megatron.hf.rounding import PASSES, limit_of, ulp_apart
from sparsecod_megatron.hf.witness import (
    Hooks,
    Outputs,
    Record,
    by_channel,
    described,
    first_difference,
)

Watch: TypeAlias = Callable[[Any, Record], AbstractContextManager[None]]
"""Hands the outputs of a model's modules to a function while the block runs."""
NOISE_CEILING = 1e-3
"""Rounding, relative to the largest logit, above which a difference of that relative size would hide in it."""


@dataclass(frozen=True)
class ParityReport:
    """How far two models are apart on the same tokens, in fp32.

    Args:
        model_dir: the HuggingFace model.
        num_tokens: positions compared.
        max_difference: largest |Δlogit| between the reference and the HuggingFace model in float64; NaN if either gave
            one.
        mean_difference: mean |Δlogit|.
        argmax_agreement: share of positions with the same most likely token.
        worst_position: (sequence, token, vocabulary entry) of the largest difference, or of the first NaN.
        noise: largest |Δlogit| between the HuggingFace model in fp32 and in float64: the rounding that it has.
        largest_logit: largest |logit|.
        first_differing_layer: first layer (0-based) whose output differs; None if none does or the reference gave none.
        first_differing_tensor: the first tensor, with its layer, that what differs comes from; None as above, or
            without witnesses.
    """

    model_dir: Path
    num_tokens: int
    max_difference: float
    mean_difference: float
    argmax_agreement: float
    worst_position: tuple[int, int, int]
    noise: float
    largest_logit: float
    first_differing_layer: int | None
    first_differing_tensor: str | None = None

    @property
    def tolerance(self) -> float:
        """Largest `max_difference` that passes."""
        return limit_of(noise=self.noise, largest=self.largest_logit)

    @property
    def is_decisive(self) -> bool:
        """Whether rounding is small enough for a wrong tensor to show."""
        return self.noise <= NOISE_CEILING * self.largest_logit

    @property
    def passed(self) -> bool:
        """Whether rounding explains all differences; it never explains a NaN."""
        return self.is_decisive and self._logits_agree and self.first_differing_tensor is None

    @property
    def _logits_agree(self) -> bool:
        return self.max_difference <= self.tolerance

    def require(self) -> None:
        """Raise unless passed.

        Raises:
            ConversionError: one line with the differences and where they are.
        """
        if self.passed:
            return
        if not self.is_decisive and self._logits_agree:
            raise ConversionError(
                f"{self.model_dir}: rounding alone moves its logits by {self.noise:.3g} (largest |logit| "
                f"{self.largest_logit:.3g}), so fp32 cannot show whether it is right; --no-verify skips the comparison"
            )
        sequence, token, entry = self.worst_position
        layer, tensor = self.first_differing_layer, self.first_differing_tensor
        raise ConversionError(
            f"{self.model_dir}: max |Δlogit| {self.max_difference:.3g}, of which the rounding of its own fp32 pass "
            f"({self.noise:.3g}) explains {self.tolerance:.3g} (sequence {sequence}, token {token}, "
            f"vocabulary entry {entry}; mean {self.mean_difference:.3g}; "
            f"argmax agrees on {self.argmax_agreement:.1%} of {self.num_tokens} tokens"
            f"{'' if layer is None else f'; first layer that differs: {layer}'}"
            f"{'' if tensor is None else f'; first tensor that differs: {tensor}'}); "
            "nothing is written, because the two models do not compute the same"
        )


@dataclass(frozen=True)
class Recorded:
    """What a reference gave, all that its comparison needs: the reference itself need not be in memory any more.

    Attributes:
        tokens: `[batch, seq]`, on the device to compare on.
        logits: `[batch, seq, vocab]`.
        outputs: by name, of modules or blocks, each `[batch, seq, channels]`; may be of the first tokens alone.
    """

    tokens: Tensor
    logits: Tensor
    outputs: Mapping[str, Tensor]


def compare_logits(
    reference: Callable[[Tensor], Tensor],
    hf_dir: Path,
    *,
    tokens: Tensor,
    reference_hidden_states: Sequence[Tensor] | None = None,
) -> ParityReport:
    """Load a HuggingFace directory in fp32 and compare it with a reference. Local: one process calls it.

    The files' numbers are compared, whatever their type: a reference must hold weights rounded to the exported type.

    Args:
        reference: tokens `[batch, seq]` to logits `[batch, seq, vocab]`.
        hf_dir: the exported directory.
        tokens: `[batch, seq]`, on the device to run on.
        reference_hidden_states: output of each block, before the final norm, each `[batch, seq, hidden]`. Read after
            `reference` has run, so hooks may fill it meanwhile.

    Returns:
        The report; `require()` it to refuse a difference.

    Raises:
        ConversionError: weights are missing, left over or of the wrong shape; or the logits' shapes differ.
    """
    with torch.no_grad():
        logits = reference(tokens)
    blocks = {f"layers.{index}": states for index, states in enumerate(reference_hidden_states or ())}
    found = Recorded(tokens, logits, blocks)
    return compare_loaded(found, load_in_fp32(hf_dir).to(tokens.device), hf_dir)


@torch.no_grad()
def compare_loaded(found: Recorded, model: Any, hf_dir: Path, *, by_module: Watch | None = None) -> ParityReport:
    """Compare a directory that `load_in_fp32` has loaded with what a reference gave. Local.

    Args:
        found: results of the reference.
        model: transformers' own.
        hf_dir: where it lies, for messages.
        by_module: watches the modules whose outputs the reference gave, so that the tensor at fault can be named; None
            where it gave those of blocks, or none.

    Raises:
        ConversionError: the logits' shapes differ.
    """
    tokens, expected = found.tokens, found.logits.float().to(found.tokens.device)
    exact = _Exact.of(model, tokens, by_module or _layer_outputs)
    if expected.shape != exact.logits.shape:
        raise ConversionError(
            f"{hf_dir}: logits have shape {list(exact.logits.shape)}, the reference's {list(expected.shape)}; use its "
            "model"
        )
    difference = (expected - exact.logits).abs_()
    worst = int(difference.flatten().argmax())  # the first NaN, if there is one
    sequence, token, entry = (int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    name = first_difference(found.outputs, exact.outputs, exact.output_noise)
    report = ParityReport(
        model_dir=hf_dir,
        num_tokens=tokens.numel(),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        argmax_agreement=float((expected.argmax(-1) == exact.logits.argmax(-1)).float().mean()),
        worst_position=(sequence, token, entry),
        noise=exact.noise,
        largest_logit=float(exact.logits.abs().max()),
        first_differing_layer=int(name.split(".")[1]) if name is not None and name.startswith("layers.") else None,
    )
    if by_module is None or (name is None and report.passed):
        return report
    if name is None:
        return replace(report, first_differing_tensor=f"the output layer: {names_in(model)('lm_head.weight')}")
    return replace(report, first_differing_tensor=described(name, model))


@dataclass(frozen=True)
class _Exact:
    """A model's float64 pass, and how far its fp32 passes are from it."""

    logits: Tensor
    outputs: Mapping[str, Tensor]
    noise: float
    output_noise: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any, tokens: Tensor, watch: Watch) -> _Exact:
        outputs: Outputs = {}
        with computing_in_float64(model), watch(model, lambda name, value: outputs.update({name: value.clone()})):
            logits = _logits(model, tokens)
        noise = logits.new_zeros(())
        output_noise: Outputs = {}

        def compare(name: str, value: Tensor) -> None:
            difference = by_channel(value - outputs[name])
            output_noise[name] = torch.maximum(output_noise.get(name, difference), difference)

        for index in range(PASSES):
            with ulp_apart(model, index), watch(model, compare):
                noise = torch.maximum(noise, (_logits(model, tokens) - logits).abs_().max())
        return cls(logits, outputs, float(noise), output_noise)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def load_in_fp32(hf_dir: Path) -> Any:
    """The causal language model of a HuggingFace directory, in evaluation mode, on CPU.

    Raises:
        ConversionError: weights are missing, left over or of the wrong shape.
    """
    with _bars_on_terminals_only():
        model, info = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[problem]:
            named = ", ".join(sorted(map(str, info[problem]))[:3])
            raise ConversionError(
                f"{hf_dir}: loading it as {type(model).__name__} reports {len(info[problem])} "
                f"{problem.replace('_', ' ')} ({named}); export it again"
            )
    avoid_unaligned_products(model)
    return model  # in evaluation mode since `from_pretrained`


@contextmanager
def _layer_outputs(model: Any, record: Record) -> Iterator[None]:
    """Records each block's output; transformers' own `hidden_states` has the last one only after the final norm."""
    hooks = Hooks(record)
    for index, layer in enumerate(model.get_decoder().layers):
        hooks.after(layer, f"layers.{index}")
    try:
        yield
    finally:
        hooks.remove()


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    hide = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
