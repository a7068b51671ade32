"""The mechanisms by name, one line each. A mechanism's module is imported when a run configures it."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsecod_megatron.seams.mechanism import Mechanism


@dataclass(frozen=True)
class Registry:
    """Names, and where the class of each is; what `load_config` takes.

    Attributes:
        places: name → `module:Class`, the module below `sparsecod_megatron.mechanisms`.
        former_keys: (key of `model:`, value) → the mechanism that replaces it.
        renames: whether former keys are read as what they have become, and not refused.
    """

    places: Mapping[str, str]
    former_keys: Mapping[tuple[str, str], str]
    renames: bool = False

    @property
    def names(self) -> list[str]:
        """All names."""
        return list(self.places)

    def settings_class(self, name: str) -> type[Mechanism]:
        """The mechanism's class, a dataclass of its settings."""
        found: type[Mechanism] = pkgutil.resolve_name(f"{__package__}.{self.places[name]}")
        assert found.name == name, f"{self.places[name]} calls itself {found.name}"
        return found


MECHANISMS = Registry(
    places={
        "attention_residuals": "residual.attention_residuals:AttentionResiduals",
        "cast": "weights.cast:Cast",
        "comet": "experts.comet:Comet",
        "complete_p": "residual.complete_p:CompleteP",
        "delta": "residual.delta:Delta",
        "dense_average": "residual.dense_average:DenseAverageResiduals",
        "distillation": "distillation.distillation:Distillation",
        "early_exit": "residual.early_exit:EarlyExit",
        "efficient_llm": "weights.efficient_llm:EfficientLlm",
        "engram": "tokens.engram:Engram",
        "frozen_masks": "weights.frozen_masks:FrozenMasks",
        "headwise_gate": "attention.headwise_gate:HeadwiseGate",
        "hyper_connections": "residual.hyper_connections:HyperConnections",
        "iss": "weights.iss:Iss",
        "journey": "weights.journey:Journey",
        "keel": "residual.keel:Keel",
        "layer_drop": "residual.layer_drop:LayerDrop",
        "loop": "residual.loop:Loop",
        "manifold_hyper_connections": "residual.manifold_hyper_connections:ManifoldHyperConnections",
        "mask_sparsity": "weights.mask_sparsity:MaskSparsity",
        "maskllm": "weights.maskllm:MaskLlm",
        "moe_router_topk_schedule": "experts.topk_schedule:TopkSchedule",
        "moe_x": "experts.moe_x:MoeX",
        "monarch": "weights.monarch:Monarch",
        "monet": "experts.monet:Monet",
        "multi_gate": "residual.multi_gate:MultiGate",
        "pgf": "weights.pgf:Pgf",
        "random_groups": "weights.random_groups:RandomGroups",
        "rigl": "weights.rigl:RigL",
        "row_scaling": "weights.row_scaling:RowScaling",
        "s2_attention": "attention.s2_attention:S2Attention",
        "scaled": "residual.scaled:Scaled",
        "set": "weights.set:Set",
        "siamese_norm": "residual.siamese_norm:SiameseNorm",
        "sltrain": "weights.sltrain:SLTrain",
        "sparse_ift": "weights.sparse_ift:SparseIFT",
        "sparse_weights": "weights.sparse_weights:SparseWeights",
        "spdf": "weights.spdf:Spdf",
        "srste": "weights.srste:SrSte",
        "ste": "weights.ste:Ste",
        "stem": "tokens.stem:Stem",
        "topk_activation": "activations.topk_activation:TopKActivation",
        "value_residual": "attention.value_residual:ValueResidual",
        "wgsef": "weights.wgsef:Wgsef",
    },
    former_keys={("attention_output_gate", "headwise"): "headwise_gate"},
)
SAVED_MECHANISMS = replace(MECHANISMS, renames=True)
"""For configurations that a run has saved, maybe by an earlier version."""
