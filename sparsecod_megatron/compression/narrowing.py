"""Stock models of smaller widths: how wide they become, and proof that their class, as configured, has those shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecod_megatron.errors import ConversionError


def kept_width(width: int, share: float, multiple: int) -> int:
    """Channels that stay.

    Args:
        width: channels before.
        share: of them to remove.
        multiple: of which the kept number is the nearest; it is never zero, nor more than there were.
    """
    return min(width, max(1, round((1 - share) * width / multiple)) * multiple)


def with_fields(model: PreTrainedModel, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A model's configuration with other values of some fields, as it will be read from `config.json`.

    Args:
        model: of a class of transformers, or of the `sparsecod` architecture.
        fields: of the configuration of its text part.

    Raises:
        ConversionError: a model whose modules a method has exchanged.
    """
    if hasattr(model, "compressed_config"):
        raise ConversionError(
            f"--model: {type(model).__name__} has modules of --method {model.compressed_config.method}, for which no "
            "configuration says other widths; give the model from before"
        )
    changed = copy.deepcopy(model.config)
    for field, value in fields.items():
        setattr(changed.get_text_config(), field, value)
    return type(changed).from_dict(changed.to_dict())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Axes of all parameters and buffers by name; tied weights under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: tuple(tensor.shape) for name, tensor in [*parameters, *model.named_buffers()]}


def class_shapes(model: PreTrainedModel, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What `shapes` says of a new model of the same class with other values of some fields; costs no memory."""
    return shapes(_made(model, with_fields(model, fields)))


def adopt(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Make a model whose weights have new shapes what its class makes of a configuration.

    Args:
        model: with new weights; its configuration is changed, and the numbers that modules took from it, such as widths
            and ε.
        fields: of the configuration of its text part, with their new values.

    Raises:
        ConversionError: a class that has other shapes, naming the first tensor.
    """
    made, modules = _made(model, with_fields(model, fields)), dict(model.named_modules())
    wanted, found = shapes(made), shapes(model)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            has, needs = (list(side[name]) if name in side else "no such tensor" for side in (found, wanted))
            raise ConversionError(
                f"{name}: would be {has} where {type(model).__name__}'s configuration of these widths makes it {needs};"
                " use another method"
            )
    for name, module in made.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                setattr(modules[name], key, value)
    for field, value in fields.items():
        setattr(model.config.get_text_config(), field, value)


def _made(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(config)
