"""What a mechanism costs a training step, against the dense one: ratios of medians.

    python -m benchmarks.mechanisms [--steps 30] [--experts 8] [--threads 1] [NAME ...]

One process trains a model of 10M parameters on 2,048 tokens a step with each mechanism and without, otherwise the same
model: with experts, or another activation, where the mechanism is of these. All take turns, step by step. Printed is
processor time, which other work on the machine changes least; `update` is a step at which masks change, and
`amortised` what the mechanism costs at its own interval. `keeps` is what the forward pass leaves for the backward pass,
by `sparsecod plan`, over the dense one's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Sequence

import torch

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.planning.layout import layout_of
from sparsecod_megatron.planning.memory import rank_memory

DENSE = "dense"
SETTINGS = {
    "complete_p": "{base_num_layers: 4}",
    "distillation": "{teacher: ':fresh:'}",
    "efficient_llm": "{start: 0}",
    "frozen_masks": "{prune: '2:4'}",
    "journey": "{start: 0, unit: steps}",
    "mask_sparsity": "{start: 0}",
    "moe_router_topk_schedule": "{topk: 1}",
    "monet": "{experts: 32, heads: 4, k: 4}",
    "pgf": "{dense_until: 0}",
    "s2_attention": "{stride: 2}",
    "sltrain": "{rank: 64}",
    "topk_activation": "{k: 64}",
}
"""Where a mechanism has no defaults for this model, or does nothing in its first steps by them."""
SHAPES = {
    "comet": ("model.moe_aux_loss_coeff=0.01",),
    "maskllm": ("optimizer.weight_decay=0",),
    "moe_router_topk_schedule": ("model.moe_router_pre_softmax=true",),
    "moe_x": ("model.activation=relu", "model.moe_aux_loss_coeff=0.01"),
    "monet": ("model.activation=relu2",),
    "topk_activation": ("model.activation=relu",),
}
"""What else it needs, which the run without it has too."""
EXPERTS = ("comet", "moe_router_topk_schedule", "moe_x")
"""Mechanisms that are of experts."""
NUM_EXPERTS = 8
"""Of each layer, where a mechanism needs some and none were asked for."""
UPDATES = ("rigl", "set", "journey", "iss", "cast", "efficient_llm")
"""Mechanisms whose masks change every `interval` steps."""
MODEL = (
    "model.num_layers=8",
    "model.hidden_size=256",
    "model.ffn_hidden_size=704",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.vocab_size=8192",
    "data.seq_length=256",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "schedule.lr_decay_style=constant",
)
WARM_UP = 3
"""Steps of each that are not measured."""
NEVER = 1_000_000
"""Steps between changes of masks that a measurement never reaches."""


def run_config(name: str, *, experts: int, is_on: bool = True, interval: int | None = None) -> RunConfig:
    """The run with a mechanism, or what it is compared with.

    Args:
        name: of the mechanism.
        experts: of each layer.
        is_on: whether it has the mechanism.
        interval: steps from one change of the masks to the next; None is the mechanism's own.
    """
    shape = [*MODEL, *SHAPES.get(name, ()), f"precision.dtype={'bf16' if torch.cuda.is_available() else 'fp32'}"]
    # So long that no schedule of a mechanism ends while it is measured.
    shape.append(f"train.train_steps={100 * NEVER if name == 'iss' else NEVER}")
    if experts := experts or (NUM_EXPERTS if name in EXPERTS else 0):
        shape += [f"model.num_moe_experts={experts}", "model.moe_ffn_hidden_size=352"]
    if is_on:
        shape.append(f"mechanisms.{name}={SETTINGS.get(name, '{}')}")
    if is_on and interval is not None:
        shape.append(f"mechanisms.{name}.interval={interval}")
    return load_config(None, shape, mechanisms=MECHANISMS)


def one_batch(config: RunConfig) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens, which every step takes again."""
    shape = (config.train.micro_batch_size, config.data.seq_length)
    assert config.model.vocab_size is not None
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(shape[1]).expand(shape)
    return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape), "position_ids": positions}


def measure(configs: dict[str, RunConfig], backend: Backend, *, steps: int) -> dict[str, float]:
    """Median processor seconds of a step by name; all take turns.

    Args:
        configs: checked runs of one process, of the same layout.
        backend: the selected backend.
        steps: of each, after the warm-up.
    """
    from sparsecod_megatron.audit.measure import release
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.clock import synchronize
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    seconds: dict[str, list[float]] = {name: [] for name in configs}
    first = next(iter(configs.values()))
    with running_processes(first, communication=backend.communication, device=backend.device) as groups:
        trainers = {name: build_trainer(config, backend, groups) for name, config in configs.items()}
        data = {name: [itertools.repeat(one_batch(config))] for name, config in configs.items()}
        for step in range(steps + WARM_UP):
            for name, trainer in trainers.items():
                synchronize(backend.device)
                began = time.process_time()
                train_step(trainer, data[name])
                synchronize(backend.device)
                if step >= WARM_UP:
                    seconds[name].append(time.process_time() - began)
        for trainer in trainers.values():
            release(trainer)
    return {name: statistics.median(values) for name, values in seconds.items()}


def activations(config: RunConfig) -> int:
    """Bytes that a step's micro-batch keeps, as planned for this machine."""
    return rank_memory(layout_of(config, 1, transformer_engine=torch.cuda.is_available()), 0).activations


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mechanisms (default: all)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each (default 30)")
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer (default 0: dense)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    backend = select_backend()
    for name in args.names or MECHANISMS.names:
        configs = {DENSE: run_config(name, experts=args.experts, is_on=False)}
        if name in UPDATES:
            configs["step"] = run_config(name, experts=args.experts, interval=NEVER)
            configs["update"] = run_config(name, experts=args.experts, interval=1)
        else:
            configs["step"] = run_config(name, experts=args.experts)
        median = measure(configs, backend, steps=args.steps)
        step = median["step"] / median[DENSE]
        kept = activations(configs["step"]) / activations(configs[DENSE])
        line = f"{name:>26}: {step:.3f} x dense ({1000 * median[DENSE]:.0f} ms), keeps {kept:.2f} x"
        if name in UPDATES:
            update = median["update"] / median[DENSE]
            own = run_config(name, experts=args.experts).mechanisms[name].interval
            line += f"; update {update:.3f}, amortised over {own}: {step + (update - step) / own:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
