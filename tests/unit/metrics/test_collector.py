"""Groups share one buffer; each is collected at its own interval, and one that is not due costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from sparsecod_megatron.metrics import StatisticsCollector
from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A process group of one, as a run on one process has."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Constant:
    """Adds one value to each layer; counts how often it was asked to collect."""

    def __init__(self, name: str, value: float, maximum: float | None = None) -> None:
        self.names: tuple[str, ...] = (name,)
        self.maxima: tuple[str, ...] = () if maximum is None else (f"{name}_max",)
        self.value, self.maximum, self.collections = value, maximum, 0

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        self.collections += 1
        for layer in range(2):
            sums.add(layer, self.names[0], torch.tensor(self.value * 4), 4)
            if self.maximum is not None:
                sums.add_maximum(layer, self.maxima[0], torch.tensor(self.maximum))
                sums.add_maximum(layer, self.maxima[0], torch.tensor(self.maximum / 2))
        yield

    def statistics(self, means: dict[str, float]) -> Statistics:
        return {name: means[name] for name in (*self.names, *self.maxima)}


def test_intervals_and_one_reduction() -> None:
    often, seldom = Constant("often", 1.5), Constant("seldom", 2.5, maximum=9.0)
    collector = StatisticsCollector(
        {"often": often, "seldom": seldom}, {"often": 2, "seldom": 3}, num_layers=2, device=CPU
    )
    seen = []
    for step in range(1, 7):
        with collector.collecting(step):
            pass
        layers = collector.reduce(step)
        seen.append(None if layers is None else sorted(layers[1]))
        if layers is not None and "seldom" in layers[0]:
            assert (layers[0]["seldom"], layers[0]["seldom_max"]) == (2.5, 9.0)
    both = ["often", "seldom", "seldom_max"]
    assert seen == [None, ["often"], ["seldom", "seldom_max"], ["often"], None, both]
    assert (often.collections, seldom.collections) == (3, 2)


def test_layers_that_nobody_holds_are_absent() -> None:
    sums = LayerAccumulator(num_layers=3, names=["a", "b"], device=CPU)
    sums.add(1, "a", torch.tensor(6.0), 3)
    assert sums.reduce() == [{}, {"a": 2.0}, {}]
    sums.reset()
    assert sums.reduce() == [{}, {}, {}]
