"""A step asks the device once, in one exchange of all ranks; its gradient norm is Megatron-Core's to the last bit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode, resolve_name

from tests.helpers.training import small_trainer, trainer_batches

READS = {f"torch.Tensor.{name}" for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "nonzero")}
MOE = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")


class Reads(TorchFunctionMode):
    """Counts calls for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := resolve_name(function)) in READS:
            self.found[name.rpartition(".")[2]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu counts what CUDA itself sees")
def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with the judge and the question of a stop, as the loop takes them."""
    from sparsecod_megatron.train.divergence import UpdateJudge
    from sparsecod_megatron.train.step import train_step

    sizes: list[int] = []
    original: Callable[..., Any] = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with small_trainer() as trainer:
        data, judge = trainer_batches(trainer), UpdateJudge(trainer.config.train, {})
        train_step(trainer, data, judge=judge)
        monkeypatch.setattr(dist, "all_reduce", counted)
        with Reads() as reads:
            result = train_step(trainer, data, judge=judge, asked_to_stop=lambda: True)
    assert result.stop
    assert reads.found == {"tolist": 1}
    gradients = sizes[:-2]  # the data-parallel buffers, which are no matter here
    assert sizes[-2:] == [1, 4] and all(size > 4 for size in gradients)


@pytest.mark.parametrize("model", [(), MOE, ("optimizer.optimizer=muon",)], ids=["dense", "moe", "muon"])
def test_norm_is_upstreams(model: tuple[str, ...]) -> None:
    """Bit for bit where one group of ranks has the whole gradient; Muon's two parts, to the last bits of fp64."""
    from sparsecod_megatron.train.outcome import squared_grad_norm
    from sparsecod_megatron.train.passes import forward_backward

    with small_trainer(*model) as trainer:
        samples = trainer.config.train.global_batch_size
        forward_backward(trainer, trainer_batches(trainer), trainer.context(1), samples=samples, forward_only=False)
        trainer.optimizer.prepare_grads()
        upstream = trainer.optimizer.get_grad_norm()
        ours = squared_grad_norm(trainer.optimizer, trainer.backend.device).item() ** 0.5
    assert upstream > 0
    assert ours == (pytest.approx(upstream, rel=1e-15) if "muon" in "".join(model) else upstream)


def test_laps_are_the_time_of_training() -> None:
    """Everything from verdict to verdict counts, but what the clock is paused for."""
    from sparsecod_megatron.train.clock import StepClock

    began = time.perf_counter()
    clock = StepClock(torch.device("cpu"))
    time.sleep(0.02)
    laps = [clock.lap()]
    with clock.paused():
        time.sleep(0.2)
    time.sleep(0.01)
    laps.append(clock.lap())
    elapsed = time.perf_counter() - began
    assert laps[0] >= 0.02 and laps[1] >= 0.01
    assert sum(laps) <= elapsed - 0.2
