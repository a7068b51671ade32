"""Trains every variant two steps from fresh weights in each layout of two processes. Started by torchrun.

Argument: the JSON file to write, {case: run}. Initial weights are the same under every layout, so nothing is loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import CP2, EP2, ETP1, PP2, SP, TP2, SpreadCase
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses, recorded_steps, trainer_batches
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

STEPS = 2
RUN = (
    *SMALL,
    "model.num_layers=4",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "schedule.lr_decay_style=constant",
    "optimizer.lr=1e-2",
    # Of the order of the gradient, so that an element of rounding noise does not move by the sign of the noise.
    "optimizer.adam_eps=1e-3",
    "model.init_method_std=0.2",
    "statistics.variance.interval=1",
)
DENSE_LAYOUTS = {"tp2": (TP2,), "tp2-sp": (TP2, SP), "pp2": (PP2,), "cp2": (CP2,)}
MOE_LAYOUTS = {"ep2": (EP2,), "tp2-ep2": (TP2, SP, EP2, ETP1), "pp2": (PP2,)}
CONCERNED = {
    # Without sequence parallelism norms are whole on each rank: what has weights that tensor parallelism leaves whole.
    "tp2": {"pre", "qk-norm", "biases", "olmo", "gemma", "neox", "sinks", "everything"},
    # Stages: what depends on a layer's place, or lies outside of the layers.
    "pp2": {
        "pre",
        "post-no-final-norm",
        "olmo",
        "neox",
        "mix",
        "lns-peri",
        "embedding-norm",
        "tied",
        "window-skip",
        "no-rope",
        "multipliers",
        "gemma",
        "everything",
        "gpt-oss",
        "first-dense",
        "topk-per-layer",
        "deepseek",
    },
    # Slices of the sequence: what depends on a token's place, or on keys of other tokens.
    "cp2": {
        "pre",
        "qk-norm",
        "olmo",
        "mqa",
        "rope-yarn",
        "rope-local",
        "sinks",
        "window",
        "window-skip",
        "everything",
        "latents",
    },
    # Whole experts move: what their shapes, the router's state, or the layers without experts change.
    "ep2": {
        "post-softmax",
        "gpt-oss",
        "expert-biases",
        "sigmoid-bias",
        "shared-gate",
        "first-dense",
        "topk-per-layer",
        "deepseek",
    },
}
"""Variants that a layout treats unlike `pre` or `post-softmax`; tensor with sequence parallelism concerns all."""
ADJUSTED = {
    "no-rope": ("model.no_rope_freq=[0,1,0,1]",),
    "topk-per-layer": ("model.moe_router_topk_per_layer=[1,2,4,2]",),
}
"""For four layers instead of three."""
ALIKE = {
    *("gelu", "gelu-tanh", "relu", "qkv-bias", "sandwich", "branch", "lns", "mha", "rope-linear", "rope-llama3"),
    *("parallel", "layernorm", "latents-llama3"),
    *("sigmoid", "sigmoid-top-1", "scaled", "shared"),
}
"""Differ from another variant in what each rank computes from what it holds, in no way that a layout could see."""
PARTITIONED = {"capacity"}
"""Depends on which tokens share a rank, by its definition."""


class Case(SpreadCase):
    """A variant in a layout."""

    def config(self) -> RunConfig:
        """The run."""
        if self.model == "dense":
            overrides = (*DENSE[self.subject], *DENSE_LAYOUTS.get(self.layout, ()))
        else:
            overrides = (*MOE_SHAPE, *MOE[self.subject], *MOE_LAYOUTS.get(self.layout, ()))
        return load_config(None, [*RUN, *overrides, *ADJUSTED.get(self.subject, ())])


CASES = [
    Case(model, variant, layout)
    for model, variants, layouts in (("dense", DENSE, DENSE_LAYOUTS), ("moe", MOE, MOE_LAYOUTS))
    for variant in variants
    for layout in layouts
    if variant not in PARTITIONED | ALIKE and variant in CONCERNED.get(layout, variants)
]


def train(config: RunConfig, backend: Backend, groups: Any) -> dict[str, Any]:
    """Losses, gradient norms, and the variance statistics of each step and layer. Collective over all processes."""
    from sparsecod_megatron.train.setup import build_trainer

    with fresh_router_losses():
        trainer = build_trainer(config, backend, groups)
        return recorded_steps(trainer, trainer_batches(trainer), range(1, STEPS + 1))


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    with found_by_ranks(backend, sys.argv[1]) as runs:
        for layout in dict.fromkeys((case.model, case.layout) for case in CASES):
            cases = [case for case in CASES if (case.model, case.layout) == layout]
            with process_groups(cases[0].config()) as groups:
                runs.update({case.name: train(case.config(), backend, groups) for case in cases})


if __name__ == "__main__":
    main()
