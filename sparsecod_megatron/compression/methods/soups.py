"""Soups: the mean of models that were pruned once and then trained apart, which keeps the zeros that they share.

θ = (1/m) Σ θ_i in fp32, of every parameter and every number that the files hold beside them. One of the models is in
memory at a time, beside the mean.

Source: Sparse Model Soups, arXiv 2306.16788.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.errors import ConversionError

DESCRIPTIVE_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys of a configuration that say nothing of what the model computes."""


class Soups(Method):
    """See the module."""

    name = "soups"
    needs = Needs(several_models=True)

    def compress(self, material: Material) -> Outcome:
        """Average, in fp32."""
        own, warnings = _tensors(material.model), list[str]()
        means = {name: tensor.detach().float().clone() for name, tensor in own.items()}
        for number, other in enumerate(material.others, start=2):
            theirs = _tensors(other)
            _require_alike(own, theirs, number)
            for name, mean in means.items():
                # Not a sum: equal models must have themselves for their mean, to the last bit, however many.
                mean += (theirs[name].detach().float() - mean) / number
            if differing := _differing_keys(material.model, other):
                warnings.append(
                    f"model {number} has other values of {', '.join(differing)} in its configuration; the first "
                    "model's are kept"
                )
        buffers = dict(material.model.named_buffers())
        for name, mean in means.items():
            if name in buffers:
                buffers[name].copy_(mean)
            else:
                material.changes.put(name, mean)
        return Outcome(warnings=warnings)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, and the buffers of floating-point numbers that are saved."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()}
    return dict(model.named_parameters()) | buffers


def _require_alike(own: dict[str, Tensor], theirs: dict[str, Tensor], number: int) -> None:
    """Refuse a model of other tensors, or with zeros in other places of a matrix, by the first that differs."""
    for name in own | theirs:
        axes = [str(list(side[name].shape)) if name in side else "nothing" for side in (own, theirs)]
        if axes[0] != axes[1]:
            raise ConversionError(
                f"{name}: the first model has {axes[0]}, model {number} has {axes[1]}; average models of one "
                "architecture"
            )
        if own[name].ndim > 1:
            differing = int(((own[name] == 0) != (theirs[name].to(own[name].device) == 0)).sum())
            if differing:
                raise ConversionError(
                    f"{name}: {differing} of {own[name].numel()} weights are zero in the first model or in model "
                    f"{number} alone, and a mean would lose them; average models pruned once and then trained apart"
                )


def _differing_keys(model: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    own, theirs = model.config.to_dict(), other.config.to_dict()
    missing: Any = object()
    return [
        key for key in own | theirs if key not in DESCRIPTIVE_KEYS and own.get(key, missing) != theirs.get(key, missing)
    ]
