"""Every validation of every run reads the same text in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.cli import sparsecod
from tests.helpers.text import write_corpus
from tests.helpers.training import small_trainer


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    write_corpus(folder / "text")
    options = ("--tokenizer", "train:300", "--val-fraction", "0.3", "--workers", "1")
    sparsecod("data", "--input", folder / "text", "--output", folder / "corpus", *options)
    return folder / "corpus"


def validation_text(prefix: Path, *overrides: str) -> torch.Tensor:
    """Tokens in the order of two validations, which must agree: [samples, S]."""
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.data import RunData, prepare_data

    with small_trainer(f"data.prefix={prefix}", "model.vocab_size=384", *overrides) as trainer:
        data = RunData(trainer, prepare_data(trainer.config)[1], TrainState())
        seen: list[torch.Tensor] = []

        def read(iterators: list[Iterator[dict[str, torch.Tensor]]]) -> float:
            seen.append(torch.cat([batch["tokens"] for batch in iterators[0]]))
            return 0.0

        data.validation_losses(read)
        data.validation_losses(read)
    assert torch.equal(*seen)
    return seen[0]


def test_seed_and_batch_do_not_choose_the_text(prefix: Path) -> None:
    reference = validation_text(prefix, "train.seed=1")
    assert len(reference.unique(dim=0)) > 30
    for overrides in (("train.seed=2",), ("train.micro_batch_size=1",), ("train.global_batch_size=8",)):
        other = validation_text(prefix, *overrides)
        shared = min(len(reference), len(other))
        assert torch.equal(other[:shared], reference[:shared]), overrides
