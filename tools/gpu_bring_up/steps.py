"""The steps in their order, how long each may take, and what it proves."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from tools.gpu_bring_up.bench import Bench

LIMIT_S = 540
"""Time limit of all steps together; what brings results back ends a command at ten minutes."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: as the table and docs/GPU.md call it.
        seconds: that it may take; what steps before it left of theirs is added.
        module: of this folder, with `run(bench)`.
        proves: in a few words.
    """

    name: str
    seconds: int
    module: str
    proves: str

    def run(self, bench: Bench) -> None:
        """Make the checks. Runs in the step's own process."""
        importlib.import_module(f"tools.gpu_bring_up.{self.module}").run(bench.of(self.name))


STEPS = (
    Step("environment", 50, "environment", "card, driver, versions; every package imports"),
    Step("kernels", 35, "kernels", "Transformer Engine's kernels compute what PyTorch's do"),
    Step("statistics", 60, "gpu_tests", "statistics on CUDA equal the CPU's"),
    Step("fp8", 90, "gpu_tests", "each FP8 recipe trains what bf16 trains"),
    Step("commands", 85, "commands", "train, resume, export; checkpoints between CPU and card; without TE"),
    Step("compression", 25, "gpu_tests", "pruning leaves the zeros of a CPU"),
    Step("throughput", 95, "throughput", "dense-1B: tokens/s, MFU, memory against plan"),
    Step("overhead", 60, "overhead", "what layer statistics cost a step"),
    Step("profile", 40, "profiling", "where a step's time goes; host synchronisations"),
)
ENVIRONMENT, KERNELS = "environment", "kernels"
KERNELS_NEEDED = ("RMSNorm", "Linear", "LayerNormLinear", "DotProductAttention, causal", "fused rope")
"""Checks of `kernels` that training in bf16 cannot do without: where one fails, later steps go without."""


def step_named(name: str) -> Step:
    """The step of that name."""
    return next(step for step in STEPS if step.name == name)
