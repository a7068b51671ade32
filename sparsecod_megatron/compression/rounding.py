"""Rounding to 8 bits by ModelOpt, of weights and of what enters a layer. Imports ModelOpt.

ModelOpt simulates: weights and inputs are rounded to the 8-bit grid and computed on in the model's own type, so what it
measures on a CPU is what an engine with 8-bit kernels gets, up to the order of sums.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from modelopt.torch import quantization
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.errors import CheckpointError, ConversionError

CONFIGURATIONS = {"fp8": quantization.FP8_DEFAULT_CFG, "int8": quantization.INT8_DEFAULT_CFG}
"""fp8: E4M3, one scale per matrix. int8: one scale per row. Inputs of a layer: one scale, fixed by calibration."""

EXPERT = re.compile(r"\.experts\.\d+\.")


def quantize(model: nn.Module, method: str, feed: Callable[[nn.Module], None]) -> list[str]:
    """Insert quantizers, in place, with the ranges of weights and of the calibration data.

    Args:
        model: to quantise; its own weights stay as they are.
        method: `fp8` or `int8`.
        feed: runs a model over the calibration sequences.

    Returns:
        Names of the layers that no calibration token reached; they take the widest range of their fellow experts.

    Raises:
        ConversionError: a layer whose weights ModelOpt stores in another layout, or a layer without any range.
    """
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise ConversionError(f"{name}: a transposed linear layer, as in GPT-2, which ModelOpt turns around")
    quantization.quantize(model, CONFIGURATIONS[method], feed)
    return _share_ranges(dict(_input_quantizers(model)))


def rounded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a quantised model as they take part in its computation.

    Returns:
        By parameter name, in the model's dtype: each rounded to its grid, in the shape it has in the plain model.
    """
    weights = {}
    for name, module in model.named_modules():
        for child_name, child in module.named_children() if isinstance(module, QuantModule) else ():
            if child_name == "weight_quantizer" and child.is_enabled:
                weights[f"{name}.weight"] = child(module.weight).detach()
            elif child_name.endswith("_weight_quantizers") and child[0].is_enabled:  # fused experts, a quantizer each
                parameter = child_name.removesuffix("_weight_quantizers")
                slices = zip(child, getattr(module, parameter), strict=True)
                weights[f"{name}.{parameter}"] = torch.stack([quantizer(each) for quantizer, each in slices]).detach()
            elif child_name.endswith("_weight_quantizer") and child.is_enabled:
                raise ConversionError(
                    f"{name}: {type(module).__name__} keeps its weights in a layout that we do not read"
                )
    return weights


def input_ranges(model: nn.Module) -> dict[str, float]:
    """Largest magnitude of each layer's input in the calibration data, by the quantizer's name."""
    return {name: float(quantizer.amax) for name, quantizer in _input_quantizers(model)}


def round_inputs(model: nn.Module, method: str, ranges: Mapping[str, float]) -> None:
    """Make a model with already rounded weights round the inputs of its layers too, in place.

    Args:
        model: a plain model.
        method: `fp8` or `int8`.
        ranges: what `input_ranges` returned for the model when it was quantised.

    Raises:
        CheckpointError: the ranges belong to another model.
    """
    quantization.quantize(model, CONFIGURATIONS[method])
    quantization.disable_quantizer(model, "*weight_quantizer*")
    quantizers = dict(_input_quantizers(model))
    if wrong := sorted(quantizers.keys() ^ ranges.keys()):
        raise CheckpointError(f"{len(wrong)} input ranges do not fit the model's layers, the first {wrong[0]}")
    for name, quantizer in quantizers.items():
        quantizer.amax = torch.tensor(ranges[name])


def _input_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and name.endswith("input_quantizer") and module.is_enabled:
            yield name, module


def _share_ranges(quantizers: Mapping[str, TensorQuantizer]) -> list[str]:
    """Fill in what calibration left without a range, from the other experts' layers of the same place."""
    unreached = [name for name, quantizer in quantizers.items() if quantizer.amax is None]
    for name in unreached:
        place = EXPERT.sub(".experts.*.", name)
        fellows = [
            quantizer.amax
            for other, quantizer in quantizers.items()
            if other not in unreached and EXPERT.sub(".experts.*.", other) == place
        ]
        if not fellows:
            layer = name.removesuffix(".input_quantizer")
            if EXPERT.search(name):
                raise ConversionError(f"{layer}: no calibration token reached this expert; give more --samples")
            raise ConversionError(
                f"{layer}: the model uses this layer's weight without calling the layer, or not at all, so what enters "
                "it cannot be seen; use --method magnitude"
            )
        quantizers[name].amax = torch.stack(fellows).max()
    return [name.removesuffix(".input_quantizer") for name in unreached]
