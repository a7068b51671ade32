"""What layer statistics cost a step on the card, by `benchmarks/statistics_overhead.py`."""

from __future__ import annotations

from benchmarks.statistics_overhead import measure, model_config
from sparsecod_megatron.config import RunConfig
from tools.gpu_bring_up.bench import Bench
from tools.gpu_bring_up.sizes import sizes
from tools.gpu_bring_up.trainers import backend_for, large_config

LIMITS = {"variance": 1.01, "activation": 1.02, "everything": 1.05}
"""Ratios to a step without statistics, collected every step."""

REHEARSAL_SIZES = ("model.num_layers=2", "model.hidden_size=64", "model.vocab_size=512", "data.seq_length=32")
"""Overrides of a rehearsal."""


def run(bench: Bench) -> None:
    """Small models, whose steps are short, and the large one; with Transformer Engine's layers and without."""
    steps = sizes(bench.cuda).overhead_steps
    shrink = () if bench.cuda else REHEARSAL_SIZES
    cases: dict[str, tuple[RunConfig, bool, int]] = {
        "10M dense": (model_config(0, *shrink), True, steps),
        "10M MoE": (model_config(8, *shrink), True, steps),
        "10M dense without Transformer Engine": (model_config(0, *shrink), False, steps),
        "dense-1B": (large_config(bench.cuda), True, max(2, steps // 8)),
    }
    for name, (config, with_engine, count) in cases.items():
        with bench.check(f"statistics every step, {name}") as found:
            if with_engine:
                bench.require_transformer_engine()
            times = measure(config, backend_for(config, transformer_engine=with_engine), steps=count)
            median = {way: clock for way, (clock, _) in times.items()}
            ratios = {way: seconds / median["off"] for way, seconds in median.items() if way != "off"}
            found.values = {"step_s": median, "ratios": ratios}
            if not bench.cuda:
                found.figure = f"{count} steps of {len(median)} ways"
                continue
            shown = ", ".join(f"{way} {ratio:.3f}" for way, ratio in ratios.items())
            found.figure = f"{1e3 * median['off']:.1f} ms without; {shown} times that"
            above = [way for way, limit in LIMITS.items() if ratios[way] > limit]
            assert not above, f"{found.figure}; above its limit: {', '.join(above)}"
