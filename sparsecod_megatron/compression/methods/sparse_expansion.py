"""Sparse Expansion: of every feed-forward layer several pruned copies, each for one cluster of its inputs.

What enters a linear layer is clustered, and SparseGPT prunes a copy of the layer for each cluster, by that cluster's
Σ x·xᵀ. A token takes the copy of the nearest centroid, so a pass multiplies by as much as one pruned layer; the files
hold all copies, in our own class (`compression/own_class.py`). All other matrices are pruned once by SparseGPT, or
stay.

Source: arXiv 2405.15756. Its code leaves attention dense, clusters along 1/32 of the width as principal axes, and keeps
none of the copies. Here the axes are at least 16, and Σ x·xᵀ of a cluster is drawn towards that of all inputs. All
matrices of a block see it dense; there a layer's second matrix sees the first one pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.expansion import Copies, Expander, ExpertLinear
from sparsecod_megatron.compression.feed_forward import feed_forwards
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.methods.low_rank import exchange_layers
from sparsecod_megatron.compression.methods.pruning import Pruning, PruningSettings
from sparsecod_megatron.compression.passes import Pruner, calibration_stream
from sparsecod_megatron.compression.watching import slots_of
from sparsecod_megatron.config.fields import above, at_least, between, choice
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import find_layers


@dataclass
class SparseExpansionSettings:
    """How many copies there are, and how they are pruned."""

    clusters: int = at_least(1, 16)
    """Copies of each expanded layer."""
    pattern: str = "0.5"
    """Where zeros are in every copy, as pruning rules take it."""
    per: str | None = field(default=None, metadata={"choices": ("matrix", "row")})
    """What a share refers to; None is `matrix`, as for sparsegpt."""
    layers: str = "*"
    """Names of the feed-forward layers' matrices to expand, with `*`, such as `*.up_proj`."""
    rest: str = choice("sparsegpt", "dense")
    """What becomes of all other matrices: pruned once, or left."""
    shrinkage: float = between(0.0, 1.0, 0.1)
    """How far Σ x·xᵀ of a cluster is drawn towards that of all inputs."""
    components: int | None = at_least(1, None)
    """Principal axes along which inputs are compared; None is 1/32 of the width, at least 16."""
    damping: float = above(0.0, 0.01)
    """Added to the diagonal of Σ x·xᵀ, as a share of its mean."""
    seed: int = at_least(0, 0)
    """Seed of the clusters' beginnings."""


class SparseExpansion(Method):
    """See the module."""

    name = "sparse_expansion"
    needs = Needs(calibration=True)
    Settings = SparseExpansionSettings

    def __init__(self, settings: SparseExpansionSettings) -> None:
        super().__init__(settings)
        pruning = PruningSettings(pattern=settings.pattern, per=settings.per, damping=settings.damping)
        self._pruning = Pruning(pruning, "sparsegpt")

    def compress(self, material: Material) -> Outcome:
        """Expand and prune block by block. Collective."""
        taken = self._pruning.taken(material.model)
        num_weights = sum(weight.numel() for _, weight in eligible(material.model))
        groups = self._expandable(material.model, set(taken))
        layers = find_layers(material.model)
        stream = calibration_stream(material, layers)
        pruner, expander = Pruner(material, self._pruning.plan), Expander(material, self._copies())
        no_progress = material.processes.no_progress
        for layer, block in enumerate(tqdm(layers.blocks, desc="blocks", unit="block", disable=no_progress)):
            name = f"{layers.name}.{layer}"
            places = [slots_of(block, name, group) for group in groups if min(group).startswith(f"{name}.")]
            found = expander.look(places, partial(stream.run, layer))
            expanded = {slot.name for place in found for slot in place.slots}
            rest = set(taken) - expanded if self.settings.rest == "sparsegpt" else set[str]()
            pruner.by_inputs(name, layer, block, rest, stream, self._pruning.pattern)
            for place in found:
                expander.exchange(place)
            if layer + 1 < len(layers):
                stream.advance(layer)
        warnings = [*pruner.notes.warnings("magnitude"), *expander.warnings()]
        if self.settings.rest == "dense":
            share = f"{expander.zeros / num_weights:.2%} zeros"
            warnings.append(f"rest=dense: a token meets {share}; the share that is reported is of all copies together")
        return Outcome(structure={"clusters": expander.clusters}, warnings=warnings)

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """What SparseGPT cannot prune, and with `rest=dense` all that is not expanded."""
        left = "rest=dense leaves what is not expanded" if self.settings.rest == "dense" else ""
        return self._pruning.obstacle(module, weight) or left or "it lies outside the model's blocks"

    def _copies(self) -> Copies:
        own = self.settings
        return Copies(own.clusters, self._pruning.pattern, own.shrinkage, own.components, own.damping, own.seed)

    def _expandable(self, model: PreTrainedModel, taken: set[str]) -> list[set[str]]:
        """Names of parameters of feed-forward layers, those together that are given the same tensor.

        Raises:
            ConversionError: there are none.
        """
        found = []
        for layer in feed_forwards(model):
            for leaves in [] if layer.is_fused else [layer.entries, (layer.exit,)]:
                names = [f"{layer.name}.{leaf}" for leaf in leaves]
                chosen = {f"{name}.weight" for name in names if fnmatchcase(name, self.settings.layers)} & taken
                found += [chosen] if chosen else []
        if not found:
            raise ConversionError(
                f"--method sparse_expansion: {type(model).__name__} has no feed-forward layer among layers="
                f"{self.settings.layers} whose matrices can be expanded by clusters of their inputs (experts that "
                "share a tensor cannot); use --method sparsegpt"
            )
        return found

    @classmethod
    def build(cls, model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
        """Exchange the layers that `structure["clusters"]` names."""
        exchange_layers(model, structure, "clusters", ExpertLinear)
