"""The gate of every conversion: the HuggingFace model, loaded as a user loads it, gives the logits of ours.

Equal models in fp32 are as far apart as rounding takes them, which depends on depth, on the size of the logits and on
massive channels: 3e-4 in one model and 1e-6 in another. So the HuggingFace model runs in float64 too, and its own fp32
passes say how much rounding there is (`rounding.py`); ours may be a small multiple of that away. So may every module's
output on a few tokens, because a wrong tensor may hardly move the logits of a deep model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.float64 import computing_in_float64
from sparsecod_megatron.hf.rounding import PASSES, limit_of, ulp_apart
from sparsecod_megatron.hf.witness import (
    Outputs,
    described,
    first_difference,
    largest_differences,
    transformers_outputs,
)

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
        """Whether rounding explains all differences; a NaN is none that it does."""
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
                f"{self.largest_logit:.3g}), so fp32 cannot show whether it is right; give --no-verify to go without"
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


def compare_logits(
    reference: Callable[[Tensor], Tensor],
    hf_dir: Path,
    *,
    tokens: Tensor,
    reference_hidden_states: Sequence[Tensor] | None = None,
    reference_outputs: Callable[[], AbstractContextManager[Mapping[str, Tensor]]] | None = None,
) -> ParityReport:
    """Load a HuggingFace directory in fp32 and compare it with a reference. Local: one process calls it.

    The files' numbers are compared, whatever their type: a reference must hold weights rounded to the exported type.

    Args:
        reference: tokens `[batch, seq]` to logits `[batch, seq, vocab]`.
        hf_dir: the exported directory.
        tokens: `[batch, seq]`, on the device to run on.
        reference_hidden_states: output of each block, before the final norm, each `[batch, seq, hidden]`. Read after
            `reference` has run, so hooks may fill it meanwhile.
        reference_outputs: opens the witnesses of the reference (`witness.megatron_outputs`), which tell which layer
            and which tensor is at fault, also where the logits hardly show it.

    Returns:
        The report; `require()` it to refuse a difference.

    Raises:
        ConversionError: weights are missing, left over or of the wrong shape; or the logits' shapes differ.
    """
    return compare_loaded(
        reference,
        load_in_fp32(hf_dir).to(tokens.device),
        hf_dir,
        tokens=tokens,
        reference_hidden_states=reference_hidden_states,
        reference_outputs=reference_outputs,
    )


@torch.no_grad()
def compare_loaded(
    reference: Callable[[Tensor], Tensor],
    model: Any,
    hf_dir: Path,
    *,
    tokens: Tensor,
    reference_hidden_states: Sequence[Tensor] | None = None,
    reference_outputs: Callable[[], AbstractContextManager[Mapping[str, Tensor]]] | None = None,
) -> ParityReport:
    """`compare_logits` with a directory that `load_in_fp32` has loaded."""
    with reference_outputs() if reference_outputs else nullcontext({}) as ours:
        expected = reference(tokens).float().to(tokens.device)
    exact = _Exact.of(model, tokens, transformers_outputs if reference_outputs else _layer_outputs)
    if expected.shape != exact.logits.shape:
        raise ConversionError(
            f"{hf_dir}: logits have shape {list(exact.logits.shape)}, the reference's {list(expected.shape)}; use its "
            "model"
        )
    difference = (expected - exact.logits).abs()
    worst = int(difference.flatten().argmax())  # the first NaN, if there is one
    sequence, token, entry = (int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    if reference_hidden_states is not None:
        ours = {f"layers.{index}": states for index, states in enumerate(reference_hidden_states)}
    name = first_difference(ours, exact.outputs, exact.output_noise)
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
    if reference_outputs is None or (name is None and report.passed):
        return report
    tensor = "the output layer: lm_head.weight" if name is None else described(name)
    return replace(report, first_differing_tensor=tensor)


@dataclass(frozen=True)
class _Exact:
    """A model's float64 pass, and how far its fp32 passes are from it."""

    logits: Tensor
    outputs: Mapping[str, Tensor]
    noise: float
    output_noise: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any, tokens: Tensor, watch: Callable[[Any], AbstractContextManager[Outputs]]) -> _Exact:
        with computing_in_float64(model), watch(model) as outputs:
            logits = _logits(model, tokens)
        noise = logits.new_zeros(())
        output_noise: Outputs = {}
        for index in range(PASSES):
            with ulp_apart(model, index), watch(model) as found:
                noise = torch.maximum(noise, (_logits(model, tokens) - logits).abs().max())
            for name, difference in largest_differences(found, outputs).items():
                output_noise[name] = torch.maximum(output_noise.get(name, difference), difference)
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
    return model  # in evaluation mode since `from_pretrained`


@contextmanager
def _layer_outputs(model: Any) -> Iterator[Outputs]:
    """Collects each block's output; transformers' own `hidden_states` has the last one only after the final norm."""
    outputs: Outputs = {}

    def keep(index: int, output: Any) -> None:
        outputs[f"layers.{index}"] = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, index=index: keep(index, output))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
