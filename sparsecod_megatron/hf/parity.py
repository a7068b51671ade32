"""The gate of every conversion: the HuggingFace model, loaded as a user loads it, gives the logits of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.witness import described, first_difference, transformers_outputs


@dataclass(frozen=True)
class ParityReport:
    """How far two models are apart on the same tokens, in fp32.

    Args:
        model_dir: the HuggingFace model.
        num_tokens: positions compared.
        max_difference: largest |Δlogit|; NaN if either model gave one.
        mean_difference: mean |Δlogit|.
        argmax_agreement: share of positions with the same most likely token.
        worst_position: (sequence, token, vocabulary entry) of the largest difference, or of the first NaN.
        tolerance: largest `max_difference` that passes.
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
    tolerance: float
    first_differing_layer: int | None
    first_differing_tensor: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the largest difference is within the tolerance; a NaN is not."""
        return self.max_difference <= self.tolerance

    def require(self) -> None:
        """Raise unless passed.

        Raises:
            ConversionError: one line with the differences and where they are.
        """
        if self.passed:
            return
        sequence, token, entry = self.worst_position
        layer, tensor = self.first_differing_layer, self.first_differing_tensor
        raise ConversionError(
            f"{self.model_dir}: max |Δlogit| {self.max_difference:.3g} is not within {self.tolerance:g} "
            f"(sequence {sequence}, token {token}, vocabulary entry {entry}; mean {self.mean_difference:.3g}; "
            f"argmax agrees on {self.argmax_agreement:.1%} of {self.num_tokens} tokens"
            f"{'' if layer is None else f'; first layer that differs: {layer}'}"
            f"{'' if tensor is None else f'; first tensor that differs: {tensor}'}); "
            "do not use this model: it does not compute what was trained"
        )


@torch.no_grad()
def compare_logits(
    reference: Callable[[Tensor], Tensor],
    hf_dir: Path,
    *,
    tokens: Tensor,
    tolerance: float = 1e-4,
    reference_hidden_states: Sequence[Tensor] | None = None,
    reference_outputs: Callable[[], AbstractContextManager[Mapping[str, Tensor]]] | None = None,
) -> ParityReport:
    """Load a HuggingFace directory in fp32 and compare it with a reference. Local: one process calls it.

    The files' numbers are compared, whatever their type: a reference must hold weights rounded to the exported type.

    Args:
        reference: tokens `[batch, seq]` to logits `[batch, seq, vocab]`.
        hf_dir: the exported directory.
        tokens: `[batch, seq]`, on the device to run on.
        tolerance: largest |Δlogit| that passes.
        reference_hidden_states: output of each block, before the final norm, each `[batch, seq, hidden]`. Read after
            `reference` has run, so hooks may fill it meanwhile.
        reference_outputs: opens the witnesses of the reference (`witness.megatron_outputs`). Where the logits differ,
            both models run a second time under them, to tell which layer and which tensor is at fault.

    Returns:
        The report; `require()` it to refuse a difference.

    Raises:
        ConversionError: weights are missing, left over or of the wrong shape; or the logits' shapes differ.
    """
    model = _load(hf_dir).to(tokens.device)
    expected = reference(tokens).float().to(tokens.device)
    with _layer_outputs(model) as outputs:
        found = model(input_ids=tokens, use_cache=False).logits
    if expected.shape != found.shape:
        raise ConversionError(
            f"{hf_dir}: logits have shape {list(found.shape)}, the reference's {list(expected.shape)}; use its model"
        )
    difference = (expected - found).abs()
    worst = int(difference.flatten().argmax())  # the first NaN, if there is one
    sequence, token, entry = (int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    report = ParityReport(
        model_dir=hf_dir,
        num_tokens=tokens.numel(),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        argmax_agreement=float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        worst_position=(sequence, token, entry),
        tolerance=tolerance,
        first_differing_layer=_first_difference(reference_hidden_states, outputs, tolerance),
    )
    if report.passed or reference_outputs is None:
        return report
    with reference_outputs() as ours, transformers_outputs(model) as theirs:
        reference(tokens)
        model(input_ids=tokens, use_cache=False)
    return _attributed(report, ours, theirs)


def _attributed(report: ParityReport, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> ParityReport:
    """The report with the first layer and the first tensor that differ."""
    name = first_difference(ours, theirs, report.tolerance)
    layers = [int(name.split(".")[1])] if name is not None and name.startswith("layers.") else []
    return replace(
        report,
        first_differing_layer=layers[0] if layers else report.first_differing_layer,
        first_differing_tensor="the output layer: lm_head.weight" if name is None else described(name),
    )


def _load(hf_dir: Path) -> Any:
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
    return model.eval()


@contextmanager
def _layer_outputs(model: Any) -> Iterator[list[Tensor]]:
    """Collects each block's output; transformers' own `hidden_states` has the last one only after the final norm."""
    outputs: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.get_decoder().layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(expected: Sequence[Tensor] | None, found: Sequence[Tensor], tolerance: float) -> int | None:
    """First layer apart by more than the tolerance, relative to the residual stream's RMS where that is above 1."""
    if expected is None:
        return None
    for layer, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        ours = ours.float().to(theirs.device)
        scale = max(1.0, float(ours.square().mean().sqrt()))
        if not float((ours - theirs).abs().max()) <= tolerance * scale:
            return layer
    return None


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
