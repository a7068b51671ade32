"""Times torch's own products against oneDNN's on this machine, for `backend/choice.py`.

Both take turns at what a small training step multiplies; the least time of a few is hardly moved by what else runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from sparsecod_megatron.backend.cpu import products

ROUNDS = 5
TOKENS, HIDDEN, INNER = 1024, 256, 704
EXPERT_ROWS = range(200, 260)
"""Rows of an expert; each size is used once, as counts of tokens hardly repeat."""
EXPERT_INNER = 352

Alternative = Callable[[], object]


def measured_seconds() -> dict[str, tuple[float, float]]:
    """Least seconds by torch and by oneDNN, for each field of `Choice` that this machine can have otherwise. Local."""
    # Other processes take a share of the clock, but idle threads count in the processor's time.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        rounds = {name: make() for name, make in _trials().items()}
        for number in range(ROUNDS + 1):
            for name, alternatives in rounds.items():
                by_torch, by_onednn = next(alternatives)
                pair = _timed(by_torch, clock), _timed(by_onednn, clock)
                if number:  # the first round only warms up
                    seconds.setdefault(name, []).append(pair)
    return {name: (min(a for a, _ in pairs), min(b for _, b in pairs)) for name, pairs in seconds.items()}


def _timed(run: Alternative, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def _trials() -> dict[str, Callable[[], Iterator[tuple[Alternative, Alternative]]]]:
    """What each round runs by torch and by oneDNN, by field of `Choice`."""
    trials = {
        "output": _output,
        "input_gradient": _input_gradient,
        "weight_gradient": _weight_gradient,
        "experts": lambda: _experts(torch.float32),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere torch multiplies bf16 without oneDNN
        trials["bf16_rows"] = lambda: _experts(torch.bfloat16)
    return trials


def _output() -> Iterator[tuple[Alternative, Alternative]]:
    x, weight = torch.ones(TOKENS, HIDDEN), torch.ones(INNER, HIDDEN)
    return _repeated(lambda by_onednn: products.output(x, weight, by_onednn))


def _input_gradient() -> Iterator[tuple[Alternative, Alternative]]:
    grad, weight = torch.ones(TOKENS, INNER), torch.ones(INNER, HIDDEN)
    return _repeated(lambda by_onednn: products.input_gradient(grad, weight, by_onednn))


def _weight_gradient() -> Iterator[tuple[Alternative, Alternative]]:
    grad, x, main_grad = torch.ones(TOKENS, INNER), torch.ones(TOKENS, HIDDEN), torch.zeros(INNER, HIDDEN)
    return _repeated(lambda by_onednn: products.add_weight_gradient(main_grad, grad, x, by_onednn))


def _repeated(run: Callable[[bool], object]) -> Iterator[tuple[Alternative, Alternative]]:
    return itertools.repeat((lambda: run(False), lambda: run(True)))


def _experts(dtype: torch.dtype) -> Iterator[tuple[Alternative, Alternative]]:
    """The three products of one linear layer of experts; sizes as they come, against sizes rounded up."""
    most = products.repeated_size(EXPERT_ROWS[-1])
    x, grad = torch.ones(most, HIDDEN, dtype=dtype), torch.ones(most, EXPERT_INNER, dtype=dtype)
    weight, main_grad = torch.ones(EXPERT_INNER, HIDDEN, dtype=dtype), torch.zeros(EXPERT_INNER, HIDDEN)

    def run(sizes: list[int], by_onednn: bool) -> None:
        for size in sizes:
            products.output(x[:size], weight, by_onednn)
            products.input_gradient(grad[:size], weight, by_onednn)
            products.add_weight_gradient(main_grad, grad[:size], x[:size], by_onednn)

    for number in range(ROUNDS + 1):
        exact = list(EXPERT_ROWS[number :: ROUNDS + 1])
        rounded = [products.repeated_size(size) for size in exact]
        if number == 0:  # generates the code that the later rounds find
            rounded = sorted({products.repeated_size(size) for size in EXPERT_ROWS})
        yield partial(run, exact, False), partial(run, rounded, dtype == torch.float32)
