"""One corpus, one set of initial weights and one single-process run a model, shared by every comparison of layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod, sparsecod_ranks
from tests.helpers.text import write_corpus

STEPS, SAVED = 8, 4
"""Of a run, and the step of its first checkpoint."""
CONFIG = """
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 96}
precision: {dtype: fp32}
data: {prefix: %s, seq_length: 32}
optimizer: {lr: 2.0e-3}
schedule: {lr_warmup_steps: 3}
train: {train_steps: %d, global_batch_size: 8, micro_batch_size: 2, eval_interval: 0}
statistics:
  {variance: {interval: 1}, moments: {interval: 1}, norms: {interval: 1}, router: {interval: 1},
   activation: {interval: 1}}
checkpoint: {save_interval: %d}
"""
MOE = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=48",
    "model.moe_shared_expert_intermediate_size=48",
)
MODELS: dict[str, tuple[str, ...]] = {"dense": (), "moe": MOE}


class Bench:
    """Runs training commands on the shared corpus.

    Args:
        directory: where everything is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        prefix = directory / "data" / "corpus"
        write_corpus(directory / "text")
        sparsecod(
            "data",
            "--input",
            directory / "text",
            "--tokenizer",
            "train:300",
            "--output",
            prefix,
            "--val-fraction",
            "0.1",
            "--workers",
            "1",
        )
        self.config = directory / "config.yaml"
        self.config.write_text(CONFIG % (prefix, STEPS, SAVED))

    def train(self, name: str, *overrides: str, nproc: int = 1) -> Path:
        """Train into a run directory called `name` and return it; a directory that exists already is resumed."""
        run = self.directory / name
        sparsecod_ranks("train", self.config, f"logging.run_dir={run}", *overrides, nproc=nproc)
        return run


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The shared corpus and command runner."""
    return Bench(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def initial(bench: Bench) -> dict[str, Path]:
    """Run directories whose checkpoint holds freshly initialised weights, by model (a step with learning rate 0)."""
    frozen = ("train.train_steps=1", "schedule.lr_warmup_steps=0", "optimizer.lr=0")
    return {name: bench.train(f"initial-{name}", *frozen, *overrides) for name, overrides in MODELS.items()}


@pytest.fixture(scope="session")
def reference(bench: Bench, initial: dict[str, Path]) -> dict[str, Path]:
    """All steps of each model in one process, from the shared initial weights."""
    return {
        name: bench.train(f"reference-{name}", f"checkpoint.init_from={initial[name]}", *overrides)
        for name, overrides in MODELS.items()
    }
