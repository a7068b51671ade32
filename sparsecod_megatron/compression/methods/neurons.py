"""Neurons: whole inner channels of feed-forward layers go, and a smaller dense model of the same class stays.

Over the calibration tokens, the inner channels n_j = act(gate_j·x)·(up_j·x) of a layer bring n_j·W_down[:, j] to its
output. Those go where the Frobenius norm of that, ‖n_j‖₂·‖W_down[:, j]‖₂, is smallest. Inputs are those of the dense
model. All layers whose width one field of the configuration sets keep as many channels, experts each their own.

With `merge` the columns of W_down that stay answer for those that go, and what a neuron costs is what is lost then
(`compression/merging.py`), so that of two neurons that do the same one goes.

Source: CFSP (arXiv 2409.13199) removes neurons by activations and weights. As published, its score does not depend on
the weights, each of which is divided by its column's sum before they are averaged over the column; this one does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.calibration import feeder
from sparsecod_megatron.compression.changes import Changes
from sparsecod_megatron.compression.experts import SeparateExperts, separate_experts
from sparsecod_megatron.compression.feed_forward import FeedForward, feed_forwards
from sparsecod_megatron.compression.merging import merge_neurons
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.narrowing import adopt, class_shapes, kept_width
from sparsecod_megatron.compression.reconstruct import squared_outputs
from sparsecod_megatron.compression.statistics import InputStatistics
from sparsecod_megatron.config.fields import above, at_least, from_to_below
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.expert_modules import FUSED_MULTIPLE

WIDTH_FIELDS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
"""Fields of configurations that set inner widths."""


GRAM_BYTES, MOST_GRAM_BYTES = 4, 4 * 2**30
"""One entry of Σ n·nᵀ, and all those that are taken in one pass over the calibration data at most."""


class Chosen(NamedTuple):
    """What stays of one layer or expert.

    Attributes:
        kept: neurons, int64 `[width]`, in order.
        exit: new values of the matrix behind them, `[out, width]`; None keeps the old ones.
        outputs: squared Frobenius norms of the outputs' change and of the old outputs; None where not measured.
    """

    kept: Tensor
    exit: Tensor | None
    outputs: tuple[float, float] | None


@dataclass
class NeuronsSettings:
    """How many neurons go."""

    share: float = from_to_below(0.0, 1.0, 0.25)
    """Share of every layer's inner channels to remove."""
    multiple: int = at_least(1, 8)
    """Widths become the nearest multiple of this."""
    merge: bool = False
    """Let the neurons that stay take over, by least squares, what those that go brought to the output."""
    damping: float = above(0.0, 0.01)
    """With `merge`: how much values that stay are held, as a share of the mean of Σ n²."""


class Neurons(Method):
    """See the module."""

    name = "neurons"
    needs = Needs(calibration=True)
    Settings = NeuronsSettings

    def compress(self, material: Material) -> Outcome:
        """Narrow every feed-forward layer that a field of the configuration describes. Collective."""
        model = material.model
        widths, fields = self._widths(model)
        chosen = dict[FeedForward, list[Chosen]]()
        unreached = []
        for layers in self._together(list(widths)):
            statistics = _inner_statistics(material, layers, gram=self.settings.merge)
            for layer in layers:
                seen = statistics[layer.name]
                unreached += [layer.exit_name for one in seen if not one.count]
                pairs = zip(seen, layer.exit_weights, strict=True)
                chosen[layer] = [self._chosen(one, weight, widths[layer]) for one, weight in pairs]
        for layer, each in chosen.items():  # once all inputs were seen, which are the dense model's
            _narrow(material.changes, layer, each)
        adopt(model, fields)
        warning = f"no calibration token reached {len(unreached)} experts or layers, where weights alone decided"
        return Outcome(warnings=[f"{warning}; the first in {unreached[0]}"] if unreached else [])

    def _together(self, layers: list[FeedForward]) -> list[list[FeedForward]]:
        """Layers of which statistics are taken in one pass: all, but for as many Σ n·nᵀ as memory may hold."""
        if not self.settings.merge:
            return [layers]
        found, held = list[list[FeedForward]](), 0
        for layer in layers:
            size = GRAM_BYTES * layer.width**2 * len(layer.exit_weights)
            if not found or held + size > MOST_GRAM_BYTES:
                found, held = [*found, []], 0
            found[-1].append(layer)
            held += size
        return found

    def _chosen(self, seen: InputStatistics, weight: Tensor, width: int) -> Chosen:
        """What stays of one layer or expert."""
        if self.settings.merge and seen.count and width < weight.shape[1]:
            assert seen.gram is not None
            try:
                kept, columns = merge_neurons(weight, seen.gram, width, self.settings.damping)
            except ConversionError as error:
                raise ConversionError(f"--method neurons: {error}") from None
            spread = torch.zeros_like(weight, dtype=torch.float32)
            spread[:, kept] = columns.float()
            return Chosen(kept, columns.to(weight.dtype), squared_outputs(spread, weight.float(), seen.gram))
        # In the order of the model, so that nothing moves where nothing goes.
        kept = _scores(seen, weight).argsort(descending=True, stable=True)[:width].sort().values
        return Chosen(kept, None, None)

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Attention, routers, and layers whose inner width no known field sets."""
        return "only feed-forward layers whose width a field of the configuration sets lose neurons"

    def _widths(self, model: PreTrainedModel) -> tuple[dict[FeedForward, int], dict[str, int]]:
        """New width of each layer whose width a field sets, and the fields' new values."""
        found, settings = feed_forwards(model), self.settings
        config, old = model.config.get_text_config(), dict[str, int]()
        for field in WIDTH_FIELDS:
            value = getattr(config, field, None)
            if value is None and field == "n_inner" and hasattr(config, field) and found:  # GPT-2's own default
                value = found[0].width
            if isinstance(value, int):
                old[field] = value
        new = {field: kept_width(value, settings.share, settings.multiple) for field, value in old.items()}
        wider = class_shapes(model, {field: value + 1 for field, value in old.items()})
        after = class_shapes(model, new)
        taken = [layer for layer in found if layer.width_in(wider) != layer.width]
        if not taken:
            raise ConversionError(
                f"--method neurons: {type(model).__name__} has no feed-forward layer whose width a field of its "
                "configuration sets; use another method"
            )
        widths = {layer: layer.width_in(after) for layer in taken}
        if settings.share and all(width == layer.width for layer, width in widths.items()):
            raise ConversionError(
                f"--method neurons: share={settings.share} with multiple={settings.multiple} removes none of "
                f"{taken[0].width} neurons; raise share or lower multiple"
            )
        for layer, width in widths.items():
            if layer.is_fused and width != layer.width and width % FUSED_MULTIPLE:
                raise ConversionError(
                    f"--method neurons: {layer.name}: fused experts of {width} neurons cannot run, which takes a "
                    f"multiple of {FUSED_MULTIPLE}; give multiple={FUSED_MULTIPLE}"
                )
        return widths, new


def _scores(seen: InputStatistics, weight: Tensor) -> Tensor:
    """Norm of each neuron's part in the output, float64 `[inner]`; of its weights, where no token came."""
    columns = weight.double().norm(dim=0)
    return seen.squares.sqrt() * columns if seen.count else columns


def _inner_statistics(material: Material, layers: list[FeedForward], *, gram: bool) -> dict[str, list[InputStatistics]]:
    """What enters each layer's exit, of every expert its own, over all processes' sequences. Collective."""
    device, model = material.model.device, material.model
    statistics = {
        layer.name: [InputStatistics.empty(layer.width, gram=gram, device=device) for _ in layer.exit_weights]
        for layer in layers
    }
    with separate_experts(model), _watching(model, layers, statistics):
        feeder(material.part(), material.batch_size)(model)
    return {name: [one.total(material.processes) for one in each] for name, each in statistics.items()}


@contextlib.contextmanager
def _watching(
    model: nn.Module, layers: list[FeedForward], statistics: Mapping[str, list[InputStatistics]]
) -> Iterator[None]:
    def see(seen: InputStatistics, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.add(inputs[0])

    hooks = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        exits = list(module.exits) if isinstance(module, SeparateExperts) else [module.get_submodule(layer.exit)]
        for leaving, seen in zip(exits, statistics[layer.name], strict=True):
            hooks.append(leaving.register_forward_pre_hook(partial(see, seen)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(changes: Changes, layer: FeedForward, chosen: list[Chosen]) -> None:
    """Leave of each expert, or of the one layer, the neurons that were chosen."""
    module, kept = layer.module, torch.stack([one.kept for one in chosen])
    pairs = zip(chosen, layer.exit_weights, strict=True)
    leaving = torch.stack([weight[:, one.kept] if one.exit is None else one.exit for one, weight in pairs])
    squares = [one.outputs for one in chosen if one.outputs is not None]
    change, size = (sum(pair[end] for pair in squares) for end in (0, 1))
    error = math.sqrt(max(0.0, change) / size) if size else None
    if layer.is_fused:
        (entry,) = layer.entries
        parts = 2 if module.has_gate else 1
        _require_gate_by_neuron(layer, kept[0])
        # Gate and up lie one after the other in one axis: [experts, parts · inner, in].
        weight = module.get_parameter(entry).unflatten(1, (parts, layer.width))
        index = kept[:, None, :, None].expand(-1, parts, -1, weight.shape[-1])
        changes.put(f"{layer.name}.{entry}", weight.gather(2, index).flatten(1, 2))
        changes.put(layer.exit_name, leaving, output_error=error)
        return
    for entry in layer.entries:
        linear = module.get_submodule(entry)
        transposed = isinstance(linear, Conv1D)
        changes.put(f"{layer.name}.{entry}.weight", linear.weight[:, kept[0]] if transposed else linear.weight[kept[0]])
        if linear.bias is not None:
            changes.put(f"{layer.name}.{entry}.bias", linear.bias[kept[0]])
    transposed = isinstance(module.get_submodule(layer.exit), Conv1D)
    changes.put(layer.exit_name, leaving[0].T if transposed else leaving[0], output_error=error)


def _require_gate_by_neuron(layer: FeedForward, kept: Tensor) -> None:
    """Refuse experts whose gate and up are not two halves of one axis, such as interleaved ones."""
    module, width = layer.module, layer.width
    if not module.has_gate:
        return
    weight = module.get_parameter(layer.entries[0])
    given = torch.linspace(-1.0, 1.0, 2 * width, device=weight.device, dtype=weight.dtype)[None]
    alone = module._apply_gate(given[:, torch.cat([kept, kept + width])])
    if not torch.allclose(module._apply_gate(given)[:, kept], alone):
        raise ConversionError(
            f"{layer.name}: {type(module).__name__} does not keep gate and up as two halves of one axis; use another "
            "method"
        )
