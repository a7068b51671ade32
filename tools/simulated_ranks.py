"""Single ranks of jobs of up to 16,384 processes, on one CPU: what they hold, join and send, against `sparsecod plan`.

    python tools/simulated_ranks.py             # the table of docs/PARALLELISM.md; a few minutes
    python tools/simulated_ranks.py --ranks 64  # its jobs of that many ranks

A rank is this process, told that it is one of many: torch's fake process group answers every collective without sending
anything. Parameters and groups are those of the shipped configurations, built on the meta device. What a step sends is
counted on a model of the same layout and few channels, which really runs; plan's formulas know no scale.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sparsecod_megatron.backend import select_backend  # noqa: E402
from sparsecod_megatron.config import RunConfig, load_config  # noqa: E402

VOCABULARY = "model.vocab_size=32000"
SMALL = (
    "model.num_layers=16",
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=16",
    "model.num_query_groups=8",
    "model.vocab_size=1024",
    "model.init=normal",
    "data.seq_length=64",
    "precision.dtype=fp32",
    "cpu_kernels=plain",
    # As on CUDA. Without overlap Megatron-Core 0.16.1 gathers the weights once for each of its optimizers, of which a
    # mixture under expert parallelism has two (distrib_optimizer.py, `step_with_ready_grads`).
    "megatron.overlap_grad_reduce=true",
    "megatron.overlap_param_gather=true",
)
SMALL_EXPERTS = (
    "model.num_moe_experts=16",
    "model.moe_ffn_hidden_size=64",
    "model.moe_router_topk=2",
    # plan assumes an even load; random logits, new in every pass, come close.
    "megatron.moe_router_force_load_balancing=true",
)


COLLECTIVES = {
    "allreduce_": (2, 0),
    "_allgather_base_": (1, 0),
    "allgather_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "alltoall_base_": (1, 1),
    "send": (1, 0),
    "recv_": (0, 0),
}
"""By name in torch.ops.c10d: how often a rank of a ring sends what an argument holds, and which argument."""
FILLED_BY_OTHERS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "alltoall_base_", "recv_")
"""Those whose result the fake group leaves as the memory was."""
NUMBERS = "other"
"""What ranks tell each other, such as counts of tokens, which plan leaves out."""
LIMIT_OFF = 0.06
"""What an uneven load explains of the exchange between experts, at 64 tokens of which each takes 2 of 16."""


@dataclass(frozen=True)
class Job:
    """A layout on many ranks.

    Attributes:
        config: of `examples/configs`, without its ending.
        ranks: of the job.
        tensor: tensor parallel size, with sequence parallelism if above 1.
        pipeline: stages.
        virtual: chunks of a stage.
        expert: expert parallel size; experts are whole on a rank.
    """

    config: str
    ranks: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1

    @property
    def overrides(self) -> list[str]:
        """The layout's keys, with as many micro-batches as keep every stage busy."""
        replicas = self.ranks // (self.tensor * self.pipeline)
        keys = [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"parallel.expert_model_parallel_size={self.expert}",
            "train.micro_batch_size=1",
            f"train.global_batch_size={replicas * 2 * self.pipeline}",
        ]
        if self.virtual:
            keys.append(f"parallel.virtual_pipeline_model_parallel_size={self.virtual}")
        if self.expert > 1:
            keys.append("parallel.expert_tensor_parallel_size=1")
        return keys

    @property
    def real(self) -> RunConfig:
        """The shipped configuration in this layout."""
        return load_config(ROOT / "examples/configs" / f"{self.config}.yaml", [VOCABULARY, *self.overrides])

    @property
    def small(self) -> RunConfig:
        """A model of few channels in this layout."""
        experts = SMALL_EXPERTS if self.config.startswith("moe") else ()
        return load_config(None, [*SMALL, *experts, *self.overrides])

    @property
    def sampled(self) -> list[int]:
        """One rank of the first, a middle and the last stage, away from the ends of their groups."""
        stages = sorted({0, self.pipeline // 2, self.pipeline - 1})
        size = self.ranks // self.pipeline
        return [stage * size + size // 3 for stage in stages]

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual or 1, "EP": self.expert}
        model_parallel = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join([*model_parallel, f"DP{self.ranks // (self.tensor * self.pipeline)}"])


JOBS = [
    Job("dense_1B", 8),
    Job("dense_1B", 64, tensor=4, pipeline=2),
    Job("dense_1B", 1024, tensor=8, pipeline=4, virtual=2),
    Job("dense_1B", 16384, tensor=8, pipeline=8),
    Job("moe_1B_7B", 8, expert=8),
    Job("moe_1B_7B", 64, tensor=2, expert=8),
    Job("moe_1B_7B", 1024, tensor=2, pipeline=2, expert=8),
    Job("moe_1B_7B", 16384, pipeline=4, expert=16),
]


@dataclass
class Observed:
    """What one rank of a job holds, joins and sends.

    Attributes:
        parameters: of its model chunks.
        made: groups that it takes part in making; every rank of a job makes all of them.
        joined: those that it is a member of.
        sent: bytes by group, in one step, as `planning.communication` counts them.
    """

    parameters: int = 0
    made: int = 0
    joined: int = 0
    sent: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def rank_of_many(rank: int, ranks: int, observed: Observed) -> Iterator[None]:
    """This process as one rank of a job whose others do not exist; groups are counted."""
    original = dist.new_group

    def new_group(ranks: list[int] | None = None, **options: Any) -> Any:
        observed.made += 1
        observed.joined += ranks is None or rank in ranks
        return original(ranks, **options | {"backend": "fake"})

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with mock.patch.object(dist, "new_group", new_group):
            yield
    finally:
        dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts what collectives send, and fills with zeros what nobody sent.

    Args:
        groups: names of the groups by their own.
    """

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups = groups
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        return result

    def _count(self, name: str, args: Any) -> None:
        factor, counted = COLLECTIVES[name]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        size = group.size()
        sent = _bytes(args[counted]) * (1 if name == "send" else factor * (size - 1) / size)
        if name in FILLED_BY_OTHERS:
            for tensor in _tensors(args[0]):
                tensor.zero_()
        # Between two stages one direction goes over the group of all processes (p2p_communication.py:74).
        label = "pipeline" if name == "send" else self.groups.get(group.group_name, NUMBERS)
        self.sent[label] += sent


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def held(config: RunConfig, rank: int, ranks: int) -> Observed:
    """Parameters and groups of a rank of a real configuration, on the meta device."""
    from sparsecod_megatron.model import build, transformer_config
    from sparsecod_megatron.parallel import process_groups

    observed, meta = Observed(), torch.device("meta")
    with rank_of_many(rank, ranks, observed), process_groups(config) as groups:
        with meta, mock.patch.object(build, "initialize"):
            megatron = transformer_config(config, transformer_engine=False)
            models = build.build_model(config, megatron, groups, device=meta, transformer_engine=False)
        observed.parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    return observed


def sent(config: RunConfig, rank: int, ranks: int) -> Observed:
    """What a rank of a small model sends in a step's passes and update; numbers that ranks tell each other left out."""
    from sparsecod_megatron.parallel import process_groups
    from sparsecod_megatron.seams.plugin import StepContext
    from sparsecod_megatron.train.passes import forward_backward
    from sparsecod_megatron.train.setup import build_trainer
    from tests.helpers.training import fresh_router_losses, micro_batches

    backend, observed = select_backend(cpu_kernels="plain"), Observed()
    with fresh_router_losses(), rank_of_many(rank, ranks, observed), process_groups(config) as groups:
        trainer = build_trainer(config, backend, groups)
        named = {"tensor": groups.tp, "expert": groups.ep, "expert tensor": groups.expt_tp, "pipeline": groups.pp}
        named |= {"data": groups.dp_cp, "expert data": groups.expt_dp}
        batches = [micro_batches(config, rank=0, size=1) for _ in trainer.models]
        samples = config.train.global_batch_size
        for step in (1, 2):  # the first forward pass finds its weights gathered
            context = StepContext(step, config.train.train_steps)
            for model in trainer.models:
                model.zero_grad_buffer()
            with Sent({group.group_name: name for name, group in named.items()}) as counting:
                forward_backward(trainer, batches, context, samples=samples, forward_only=False)
                trainer.optimizer.prepare_grads()
                trainer.optimizer.step_with_ready_grads()
        observed.sent = counting.sent
    return observed


def row(job: Job, rank: int) -> tuple[list[str], float]:
    """What the table says of a rank, and by how much its parameters or the bytes of a group are off the plan.

    Returns:
        (cells, largest relative difference).
    """
    from sparsecod_megatron.planning.communication import step_traffic
    from sparsecod_megatron.planning.layout import layout_of

    real, small = job.real, job.small
    stage = rank // (job.ranks // job.pipeline)
    layout = layout_of(real, job.ranks, transformer_engine=False)
    parameters = sum(layout.on_rank(kind) * count for kind, count in layout.stage_parameters(stage))
    traffic = step_traffic(layout_of(small, job.ranks, transformer_engine=False), stage)
    found, counted = held(real, rank, job.ranks), sent(small, rank, job.ranks).sent
    off = {"parameters": found.parameters / parameters - 1}
    off |= {each.group: counted[each.group] / each.bytes - 1 for each in traffic}
    unplanned = {name for name, value in counted.items() if value} - set(off) - {NUMBERS}
    assert not unplanned, f"{job}, rank {rank}: sends over {unplanned}, which plan does not know"
    worst = max(off, key=lambda name: abs(off[name]))
    difference = "none" if abs(off[worst]) < 1e-9 else f"{worst} {100 * off[worst]:+.1f} %"
    groups = ", ".join(sorted(set(off) - {"parameters"}))
    cells = [job.config, f"{job.ranks:,}", str(job), f"{rank:,}", f"{found.parameters:,}", f"{found.made:,}"]
    return [*cells, str(found.joined), groups, difference], abs(off[worst])


def main() -> int:
    """Print the table; exit status 1 if something is off by more than an uneven load explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="of the jobs to simulate (default: all jobs)")
    ranks = parser.parse_args().ranks
    select_backend(cpu_kernels="plain")
    print(
        "| configuration | ranks | layout | rank | its parameters | groups made | joined | sends over | off the plan |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for job in (job for job in JOBS if ranks in (None, job.ranks)):
        for rank in job.sampled:
            cells, difference = row(job, rank)
            worst = max(worst, difference)
            print(f"| {' | '.join(cells)} |", flush=True)
    return int(worst > LIMIT_OFF)


if __name__ == "__main__":
    sys.exit(main())
