"""Trains each group of mechanisms three steps from fresh weights in each layout of two processes. Started by torchrun.

Arguments: the JSON file to write, {case: run}, and a folder for the checkpoints that `SAVES` makes after two steps and
`RESUMED` continues from.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.dist.layouts import BUCKETS, CP2, EP2, ETP1, FULL_RECOMPUTE, PP2, SP, TP2, VPP2, SpreadCase
from tests.helpers.mechanisms import CASES, ONE_STAGE, TOGETHER, UNDIVIDED, settings
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses, recorded_steps, trainer_batches

STEPS = 3
RUN = (
    *SMALL,
    "model.num_layers=4",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "schedule.lr_decay_style=constant",
    "optimizer.lr=1e-2",
    # Of the order of the gradient, so that an element of rounding noise does not move by the sign of the noise.
    "optimizer.adam_eps=1e-3",
    "model.init_method_std=0.2",
    # Split over tensor-parallel ranks as few vectors are: each rank's part counts in the gradient norm.
    "model.qkv_bias=true",
    "statistics.variance.interval=1",
    "statistics.norms.interval=1",
    "statistics.mechanisms.interval=1",
)
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24", "model.moe_shared_expert_intermediate_size=24")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": BUCKETS,
    "tp2": (TP2,),
    "tp2-sp": (TP2, SP),
    "pp2-full-recompute": (PP2, *FULL_RECOMPUTE),
    "pp2-vpp2": (PP2, VPP2, *BUCKETS),
    "cp2": (CP2, *BUCKETS),
    "tp2-sp-full-recompute": (TP2, SP, *FULL_RECOMPUTE),
    "dp2-full-recompute": (*BUCKETS, *FULL_RECOMPUTE),
}
EXPERT_LAYOUTS: dict[str, tuple[str, ...]] = {
    "ep2": (EP2,),
    "tp2-sp": (TP2, SP),
    "tp2-sp-ep2": (TP2, SP, EP2, ETP1),
    "cp2-ep2": (CP2, EP2, *BUCKETS),
    "pp2-full-recompute": (PP2, *FULL_RECOMPUTE),
}
SAVES = {"dense": "tp2-sp", "moe": "ep2"}


class LayoutCase(SpreadCase):
    """A group of mechanisms in a layout."""

    def config(self) -> RunConfig:
        """The run."""
        spread = LAYOUTS if self.model == "dense" else EXPERT_LAYOUTS
        shape = EXPERTS if self.model == "moe" else ()
        return load_config(
            None, [*RUN, *shape, *settings(self.subject), *spread.get(self.layout, ())], mechanisms=MECHANISMS
        )


PATHS = ("depth-attention", "streams")
"""Residual paths: one of slots and one of streams, whose wide state pipeline stages send each other."""
EVERYWHERE = ("gate-masks-topk", "factors", "marks", "tokens", "teachers", "product-keys", "loops", *PATHS)
"""Runs that are tried in every layout; the others share their code, and are in one of each kind of split.
Experts' neurons are the unit tests' matter."""
ROUTERS = ("routers", "trees")
"""Runs whose mechanisms need experts, and which have every layout of theirs."""
MASKS_OF_EXPERTS = ("tp2-sp-ep2", "gate-masks-topk")
"""Where tensor-parallel ranks hold different experts, whose masks one threshold decides."""
KINDS_OF_SPLIT = ("dp2", "tp2-sp", "pp2-vpp2", "ep2")
RECOMPUTED_BUCKETS = "dp2-full-recompute"
"""For layers that share parameters, whose gradients come one by one; buckets must wait for the last of them."""
RECOMPUTE_OF_ONE_STAGE = "tp2-sp-full-recompute"
"""For runs that no pipeline can have; the others recompute in theirs."""


def is_tried(model: str, group: str, layout: str) -> bool:
    """Whether a run is in a layout: enough of them to see each mechanism's own code in each kind of split."""
    names, is_dense = TOGETHER[group], model == "dense"
    if not any(CASES[name].dense if is_dense else CASES[name].experts for name in names):
        return False
    if group in ONE_STAGE:
        return layout != RECOMPUTED_BUCKETS and not layout.startswith("pp2")
    if group in UNDIVIDED and layout in ("pp2-vpp2", RECOMPUTED_BUCKETS):
        return layout == RECOMPUTED_BUCKETS
    if layout in (RECOMPUTE_OF_ONE_STAGE, RECOMPUTED_BUCKETS):
        return False
    if not (layout in ("ep2", "tp2-sp") or is_dense or group in ROUTERS or (layout, group) == MASKS_OF_EXPERTS):
        return False
    return group in (*EVERYWHERE, *ROUTERS) or (layout in KINDS_OF_SPLIT and (model, group) != ("moe", "groups"))


LAYOUT_CASES = [
    LayoutCase(model, group, layout)
    for model, layouts in (("dense", LAYOUTS), ("moe", EXPERT_LAYOUTS))
    for layout in layouts
    for group in TOGETHER
    if is_tried(model, group, layout)
]
RESUMED = {"dense": ("dp2", "pp2-vpp2"), "moe": ("tp2-sp",)}
"""Layouts in which each that has them continues from the checkpoint of `SAVES`."""


def train(
    config: RunConfig, backend: Backend, groups: Any, *, save: Path | None = None, resume: Path | None = None
) -> dict[str, Any]:
    """Losses, gradient norms and statistics of each step and layer, from fresh weights or a checkpoint. Collective.

    Args:
        config: the run.
        backend: the selected backend.
        groups: the run's process groups.
        save: folder for a checkpoint before the last step.
        resume: folder with such a checkpoint, to take the last step from.
    """
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.setup import build_trainer

    with fresh_router_losses():
        if resume is not None:  # other weights and masks than the checkpoint's
            config = replace(config, train=replace(config.train, seed=7))
        trainer, done = build_trainer(config, backend, groups), 0
        if resume is not None:
            done = load_checkpoint(resolve_step_dir(resume), trainer).step
        data = trainer_batches(trainer)
        for iterator in data:
            for _ in range(done * trainer.num_microbatches(config.train.global_batch_size)):
                next(iterator)

        def save_before_the_last(step: int) -> None:
            if step == STEPS and save is not None:
                save_checkpoint(save, trainer, state=TrainState(step=step - 1, optimizer_steps=step - 1))

        return recorded_steps(trainer, data, range(done + 1, STEPS + 1), before=save_before_the_last)


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    folder = Path(sys.argv[2])
    saving = [case for case in LAYOUT_CASES if SAVES[case.model] == case.layout]
    with found_by_ranks(backend, sys.argv[1]) as runs:
        for case in [*saving, *(case for case in LAYOUT_CASES if case not in saving)]:
            config, checkpoints = case.config(), folder / f"{case.model}-{case.subject}"
            with process_groups(config) as groups:
                save = checkpoints if case in saving else None
                runs[case.name] = train(config, backend, groups, save=save)
                if case.layout in RESUMED[case.model]:
                    runs[f"{case.name}-resumed"] = train(config, backend, groups, resume=checkpoints)


if __name__ == "__main__":
    main()
