"""Training steps against transformers: the same model, weights and tokens, in turns; ratios of tokens per second.

    python -m benchmarks.training [--model dense-7.7M|dense-15M|moe-8|moe-32] [--repeats 15] [--threads 1]

Ours is the real train step (Megatron-Core's schedule, distributed optimizer, clipping) with each value of the key
`cpu_kernels`. Theirs is LlamaForCausalLM or MixtralForCausalLM, as `sparsecod export` writes it, in a plain eager loop:
zero_grad, backward, clip_grad_norm_, fused AdamW. All start from the same weights, and the losses of the first steps
must agree, or nothing is measured. Everything is fp32, 8 sequences of 256 tokens per step.

Printed are medians of processor time and of the clock; a ratio above 1 says ours is faster. On a shared machine trust
processor time with one thread.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]

COMMON = {
    "model.num_layers": 8,
    "model.vocab_size": 4096,
    "model.num_query_groups": 2,
    "precision.dtype": "fp32",
    "data.seq_length": 256,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "schedule.lr_decay_style": "constant",
    # So low that routers, which have no auxiliary loss here, stay near the even load that they start with.
    "optimizer.lr": 1e-4,
    "optimizer.clip_grad": 1.0,
}
WIDTH_256 = {"model.hidden_size": 256, "model.num_attention_heads": 8, "model.ffn_hidden_size": 704}
WIDTH_384 = {"model.hidden_size": 384, "model.num_attention_heads": 6, "model.ffn_hidden_size": 1024}
# Auxiliary losses are defined differently on both sides.
EXPERTS = {**WIDTH_256, "model.moe_router_load_balancing_type": "none", "model.moe_z_loss_coeff": 0}
MODELS: dict[str, dict[str, Any]] = {
    "dense-7.7M": WIDTH_256,
    "dense-15M": WIDTH_384,
    "moe-8": {**EXPERTS, "model.num_moe_experts": 8, "model.moe_ffn_hidden_size": 352, "model.moe_router_topk": 2},
    "moe-32": {**EXPERTS, "model.num_moe_experts": 32, "model.moe_ffn_hidden_size": 176, "model.moe_router_topk": 4},
}
KERNELS = ("plain", "fast", "compiled")
THEIRS = "transformers"
WARM_UP_STEPS = 5
"""Not measured, and their losses compared: code is compiled, caches fill."""
LOSS_TOLERANCE = 1e-3
"""Nats between both sides in any of these steps; rounding makes 1e-5, another formula far more."""


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(args.threads)
    overrides = {**COMMON, **MODELS[args.model]}
    config = load_config(None, [f"{key}={value}" for key, value in overrides.items()])
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainers = {kernels: _trainer(config, backend, groups) for kernels in args.kernels.split(",")}
        weights = _weights(next(iter(trainers.values())))
        size = sum(tensor.numel() for tensor in weights.values())
        print(f"{args.model}: {size / 1e6:.2f}M parameters, {args.threads} threads, {args.repeats} steps of each")
        ways: dict[str, Step] = {THEIRS: _transformers_step(config, weights)}
        ways |= {kernels: _our_step(trainer, kernels) for kernels, trainer in trainers.items()}
        data = batches(config)
        _warm_up(ways, data)
        _print_times(_measure(ways, data, args.repeats), tokens=8 * 256)
        if args.profile:
            _print_profiles(ways, next(data))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense-7.7M")
    parser.add_argument("--repeats", type=int, default=15, help="measured steps of each side (default 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="values of cpu_kernels, comma-separated")
    parser.add_argument("--profile", action="store_true", help="also where the time of one step of each side goes")
    return parser


def batches(config: RunConfig) -> Iterator[Batch]:
    """Endless micro-batches of random tokens, small ids more frequent."""
    generator = torch.Generator().manual_seed(0)
    size, length = config.train.micro_batch_size, config.data.seq_length
    assert config.model.vocab_size is not None
    while True:
        ids = (torch.rand(size, length + 1, generator=generator).square() * config.model.vocab_size).long()
        yield {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(size, length),
            "position_ids": torch.arange(length).repeat(size, 1),
        }


def _trainer(config: RunConfig, backend: Backend, groups: Any) -> Any:
    from sparsecod_megatron.train.setup import build_trainer

    return build_trainer(config, backend, groups)


def _weights(trainer: Any) -> dict[str, Tensor]:
    from sparsecod_megatron.model import unwrap

    return {name: value.detach().clone() for name, value in unwrap(trainer.models[0]).named_parameters()}


def _our_step(trainer: Any, kernels: str) -> Step:
    from sparsecod_megatron.train.step import train_step

    def step(batch: Batch) -> float:
        select_backend(cpu_kernels=kernels)
        return train_step(trainer, [iter([batch])]).loss

    return step


def _transformers_step(config: RunConfig, weights: dict[str, Tensor]) -> Step:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from sparsecod_megatron.hf.export import export_model

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        length = config.data.seq_length
        export_model(config.model, weights, directory, seq_length=length, dtype=torch.float32, tokenizer_dir=None)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    section = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (section.adam_beta1, section.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.adam_eps, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        labels = batch["labels"]
        loss = model(input_ids=batch["tokens"], labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        return float(loss)

    print(f"{THEIRS}: {type(model).__name__}, {model.config._attn_implementation} attention", end="")
    print(f", {model.config._experts_implementation} experts" if config.model.is_moe else "")
    return step


def _warm_up(ways: dict[str, Step], data: Iterator[Batch]) -> None:
    worst = 0.0
    for number in range(WARM_UP_STEPS):
        batch = next(data)
        losses = {name: step(batch) for name, step in ways.items()}
        difference = max(losses.values()) - min(losses.values())
        if not difference < LOSS_TOLERANCE:
            raise SystemExit(f"step {number + 1}: losses {losses} differ by {difference:g}: not the same model")
        worst = max(worst, difference)
    print(f"losses of the first {WARM_UP_STEPS} steps agree to {worst:.1e} nats")


def _measure(ways: dict[str, Step], data: Iterator[Batch], repeats: int) -> dict[str, tuple[float, float]]:
    """Median processor and clock seconds of a step, by way."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        batch = next(data)
        for name, step in ways.items():
            began = time.process_time(), time.perf_counter()
            step(batch)
            seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return {
        name: (statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs))
        for name, pairs in seconds.items()
    }


def _print_times(medians: dict[str, tuple[float, float]], tokens: int) -> None:
    processor, clock = medians[THEIRS]
    for name, (own_processor, own_clock) in medians.items():
        print(
            f"{name:>12}: processor {1000 * own_processor:7.1f} ms, {processor / own_processor:.2f} x theirs; "
            f"clock {1000 * own_clock:7.1f} ms, {clock / own_clock:.2f} x theirs, {tokens / own_clock:.0f} tokens/s"
        )


def _print_profiles(ways: dict[str, Step], batch: Batch) -> None:
    for name, step in ways.items():
        with profile() as record:
            step(batch)
        print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=16)}")


if __name__ == "__main__":
    main()
