"""Low rank: a linear layer becomes two, through a bottleneck that keeps the largest singular values.

W ≈ (U_r √S_r)(√S_r V_rᵀ), the best product of rank r in the Frobenius norm. The directory is of our own class
(`compression/own_class.py`): it stores r · (in + out) weights where in · out were.

Source: C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.changes import Changes, eligible, holder
from sparsecod_megatron.compression.method import Material, Method, Outcome
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.errors import CheckpointError, ConfigError

LINEAR = (nn.Linear, Conv1D)


@dataclass
class LowRankSettings:
    """How much of each matrix is kept: one of `rank` and `share`."""

    rank: int | None = at_least(1, None)
    """Singular values kept in every matrix."""
    share: float | None = field(default=None, metadata={"above": 0.0, "below": 1.0})
    """Share of a matrix's weights that are stored; its rank follows."""
    layers: str = "*"
    """Names of the layers to take, with `*`, such as `*.mlp.*`."""


class FactoredLinear(nn.Module):
    """Two linear layers in the place of one: `[..., in]` → `[..., rank]` → `[..., out]`.

    Args:
        in_features: channels that enter.
        out_features: channels that leave.
        rank: between them.
        bias: whether the second has one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product, `[out, in]`, for models that multiply by a layer's weight themselves."""
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        """Weight of the second layer."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        output: Tensor = self.second(self.first(x))
        return output


class Factoring(Method):
    """What puts two thin matrices in the place of one, and finds them again by `structure["ranks"]`."""

    settings: Any  # with `layers`

    def linear_layers(self, model: PreTrainedModel) -> list[tuple[str, Any]]:
        """Names and modules of the linear layers that `layers` names."""
        found = [(name.removesuffix(".weight"), holder(model, name)) for name, _ in eligible(model)]
        return [each for each in found if isinstance(each[1], LINEAR) and fnmatchcase(each[0], self.settings.layers)]

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Only linear layers are taken, and only those that `layers` names."""
        if not isinstance(module, LINEAR):
            return "routers, fused experts and other weights outside linear layers"
        return f"not among layers={self.settings.layers}"

    @classmethod
    def build(cls, model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
        """Exchange the layers that `structure["ranks"]` names."""
        exchange_layers(model, structure, "ranks", FactoredLinear)


class LowRank(Factoring):
    """See the module."""

    name = "low_rank"
    Settings = LowRankSettings

    def __init__(self, settings: LowRankSettings) -> None:
        super().__init__(settings)
        if (settings.rank is None) == (settings.share is None):
            raise ConfigError("--method low_rank: give one of rank=N and share=S with --set")

    def compress(self, material: Material) -> Outcome:
        """Factorise every matrix that `reason` has nothing against."""
        ranks: dict[str, int] = {}
        for layer, module in self.linear_layers(material.model):
            if self._growth(module):
                continue
            ranks[layer] = self._rank(*features(module))
            left = torch.linalg.svd(matrix_of(module), full_matrices=False).U
            put_factors(material.changes, layer, module, left[:, : ranks[layer]])
        return Outcome(structure={"ranks": ranks})

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Only linear layers are taken, and only where two thin matrices are smaller than one."""
        return self._growth(module) or super().reason(module, weight)

    def _growth(self, module: nn.Module) -> str:
        if not isinstance(module, LINEAR):
            return ""
        inputs, outputs = features(module)
        rank = self._rank(inputs, outputs)
        grows = rank * (inputs + outputs) >= inputs * outputs
        return f"a product of rank {rank} would store as many weights or more" if grows else ""

    def _rank(self, inputs: int, outputs: int) -> int:
        share = self.settings.share
        return self.settings.rank or max(1, int(share * inputs * outputs / (inputs + outputs)))


def exchange_layers(
    model: PreTrainedModel, structure: Mapping[str, Any], key: str, kind: Callable[..., nn.Module]
) -> None:
    """Put modules of another kind in the places of linear layers, without weights.

    Args:
        model: as its class makes it.
        structure: of the method.
        key: of what it says of the layers, a number for each name.
        kind: makes a module of (in, out), that number, and whether there is a bias.

    Raises:
        CheckpointError: a structure that does not fit the model.
    """
    try:
        for name, number in dict(structure[key]).items():
            module: Any = model.get_submodule(name)
            model.set_submodule(name, kind(*features(module), int(number), bias=module.bias is not None))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json: {key} that do not fit {type(model).__name__}: {error}") from error


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def matrix_of(module: Any) -> Tensor:
    """Weights of a linear layer, float32 `[out, in]`."""
    weight = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


def factors(module: Any, left: Tensor) -> FactoredLinear:
    """Two layers for U·(UᵀW), the matrix nearest to W whose columns lie where those of U do.

    Args:
        module: a linear layer with the matrix W, `[out, in]`.
        left: U, float32 `[out, rank]` with orthonormal columns. With W's own left singular vectors this is the
            truncated SVD, (U√S)(√S Vᵀ): the norm of each channel between the layers is shared by both.
    """
    rows = left.T @ matrix_of(module)
    norms = rows.norm(dim=1)
    root = torch.where(norms > 0, norms, 1).sqrt()
    with torch.device("meta"):
        factored = FactoredLinear(*features(module), left.shape[1], bias=module.bias is not None)
    factored.first.weight = _parameter(rows / root[:, None], module.weight)
    factored.second.weight = _parameter(left * root, module.weight)
    if module.bias is not None:
        factored.second.bias = module.bias
    return factored


def put_factors(
    changes: Changes, layer: str, module: Any, left: Tensor, *, dense: bool = False, output_error: float | None = None
) -> None:
    """Put `factors`, or their product, in the place of a linear layer.

    Args:
        changes: of the model.
        layer: the linear layer's name.
        module: it.
        left: as for `factors`.
        dense: write the product into the layer that is there.
        output_error: as in `MatrixChange`, where it is known.
    """
    factored = factors(module, left)
    product = factored.weight.T if isinstance(module, Conv1D) else factored.weight
    if dense:
        changes.put(f"{layer}.weight", product, output_error=output_error)
    else:
        changes.exchange(f"{layer}.weight", factored, product=product, output_error=output_error)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype).contiguous(), requires_grad=False)
