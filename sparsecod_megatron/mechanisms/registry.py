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
        "cast": "weights.cast:Cast",
        "comet": "experts.comet:Comet",
        "distillation": "distillation.distillation:Distillation",
        "efficient_llm": "weights.efficient_llm:EfficientLlm",
        "engram": "tokens.engram:Engram",
        "frozen_masks": "weights.frozen_masks:FrozenMasks",
        "headwise_gate": "attention.headwise_gate:HeadwiseGate",
        "iss": "weights.iss:Iss",
        "journey": "weights.journey:Journey",
        "mask_sparsity": "weights.mask_sparsity:MaskSparsity",
        "moe_router_topk_schedule": "experts.topk_schedule:TopkSchedule",
        "moe_x": "experts.moe_x:MoeX",
        "maskllm": "weights.maskllm:MaskLlm",
        "monet": "experts.monet:Monet",
        "monarch": "weights.monarch:Monarch",
        "pgf": "weights.pgf:Pgf",
        "random_groups": "weights.random_groups:RandomGroups",
        "rigl": "weights.rigl:RigL",
        "set": "weights.set:Set",
        "sltrain": "weights.sltrain:SLTrain",
        "sparse_ift": "weights.sparse_ift:SparseIFT",
        "sparse_weights": "weights.sparse_weights:SparseWeights",
        "spdf": "weights.spdf:Spdf",
        "srste": "weights.srste:SrSte",
        "ste": "weights.ste:Ste",
        "wgsef": "weights.wgsef:Wgsef",
        "stem": "tokens.stem:Stem",
        "s2_attention": "attention.s2_attention:S2Attention",
        "topk_activation": "activations.topk_activation:TopKActivation",
    },
    former_keys={("attention_output_gate", "headwise"): "headwise_gate"},
)
SAVED_MECHANISMS = replace(MECHANISMS, renames=True)
"""For configurations that a run has saved, maybe by an earlier version."""
