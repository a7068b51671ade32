"""The process of one step: `python3 -m tools.gpu_bring_up.step BENCH`, BENCH as `Bench.to_json` wrote it."""

from __future__ import annotations

import sys

from tools.gpu_bring_up.bench import Bench
from tools.gpu_bring_up.steps import step_named

if __name__ == "__main__":
    bench = Bench.from_json(sys.argv[1])
    step_named(bench.step).run(bench)
