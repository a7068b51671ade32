"""Neurons: whole inner channels of feed-forward layers go, and a smaller dense model of the same class stays.

Over the calibration tokens, the inner channels n_j = act(gate_j·x)·(up_j·x) of a layer bring n_j·W_down[:, j] to its
output. Those go where the Frobenius norm of that, ‖n_j‖₂·‖W_down[:, j]‖₂, is smallest. Inputs are those of the dense
model. All layers whose width one field of the configuration sets keep as many channels, experts each their own.

Source: CFSP (arXiv 2409.13199) removes neurons by activations and weights. As published, its score does not depend on
the weights, each of which is divided by its column's sum before they are averaged over the column; this one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.calibration import feeder
from sparsecod_megatron.compression.changes import Changes
from sparsecod_megatron.compression.experts import SeparateExperts, separate_experts
from sparsecod_megatron.compression.feed_forward import FeedForward, feed_forwards
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.narrowing import adopt, class_shapes, kept_width
from sparsecod_megatron.compression.statistics import InputStatistics
from sparsecod_megatron.config.fields import at_least, from_to_below
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


@dataclass
class NeuronsSettings:
    """How many neurons go."""

    share: float = from_to_below(0.0, 1.0, 0.25)
    """Share of every layer's inner channels to remove."""
    multiple: int = at_least(1, 8)
    """Widths become the nearest multiple of this."""


class Neurons(Method):
    """See the module."""

    name = "neurons"
    needs = Needs(calibration=True)
    Settings = NeuronsSettings

    def compress(self, material: Material) -> Outcome:
        """Narrow every feed-forward layer that a field of the configuration describes. Collective."""
        model = material.model
        widths, fields = self._widths(model)
        statistics = _inner_statistics(material, list(widths))
        unreached = []
        for layer, width in widths.items():
            seen = statistics[layer.name]
            unreached += [layer.exit_name for one in seen if not one.count]
            scores = [_scores(one, weight) for one, weight in zip(seen, layer.exit_weights, strict=True)]
            # In the order of the model, so that nothing moves where nothing goes.
            kept = [score.argsort(descending=True, stable=True)[:width].sort().values for score in scores]
            _narrow(material.changes, layer, torch.stack(kept))
        adopt(model, fields)
        warning = f"no calibration token reached {len(unreached)} experts or layers, where weights alone decided"
        return Outcome(warnings=[f"{warning}; the first in {unreached[0]}"] if unreached else [])

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


def _inner_statistics(material: Material, layers: list[FeedForward]) -> dict[str, list[InputStatistics]]:
    """What enters each layer's exit, of every expert its own, over all processes' sequences. Collective."""
    device, model = material.model.device, material.model
    statistics = {
        layer.name: [InputStatistics.empty(layer.width, gram=False, device=device) for _ in layer.exit_weights]
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


def _narrow(changes: Changes, layer: FeedForward, kept: Tensor) -> None:
    """Leave the neurons `kept`, `[experts, width]`, of each expert, or of the one layer, `[1, width]`."""
    module = layer.module
    if layer.is_fused:
        (entry,) = layer.entries
        parts = 2 if module.has_gate else 1
        _require_gate_by_neuron(layer, kept[0])
        # Gate and up lie one after the other in one axis: [experts, parts · inner, in].
        weight = module.get_parameter(entry).unflatten(1, (parts, layer.width))
        index = kept[:, None, :, None].expand(-1, parts, -1, weight.shape[-1])
        changes.put(f"{layer.name}.{entry}", weight.gather(2, index).flatten(1, 2))
        leaving = module.get_parameter(layer.exit)
        changes.put(layer.exit_name, leaving.gather(2, kept[:, None].expand(-1, leaving.shape[1], -1)))
        return
    for entry in layer.entries:
        linear = module.get_submodule(entry)
        transposed = isinstance(linear, Conv1D)
        changes.put(f"{layer.name}.{entry}.weight", linear.weight[:, kept[0]] if transposed else linear.weight[kept[0]])
        if linear.bias is not None:
            changes.put(f"{layer.name}.{entry}.bias", linear.bias[kept[0]])
    linear = module.get_submodule(layer.exit)
    transposed = isinstance(linear, Conv1D)
    changes.put(layer.exit_name, linear.weight[kept[0]] if transposed else linear.weight[:, kept[0]])


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
