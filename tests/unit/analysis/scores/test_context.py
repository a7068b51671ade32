"""The sample: seeded, without overlap, split in halves; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsecod_megatron.analysis.scores.context import draw_windows, make_context
from sparsecod_megatron.analysis.scores.registry import SCORES, find_scores
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.parallel.processes import Processes
from tests.unit.analysis.scores import naive
from tests.unit.analysis.scores.families import context, tiny, tokens


def test_windows_are_pieces_of_the_stream_that_do_not_overlap() -> None:
    windows = draw_windows(torch.arange(1003), num_samples=30, seq_length=9, seed=1)
    assert windows.shape == (30, 10)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()
    assert len(windows.flatten().unique()) == 300
    assert windows[:, 0].tolist() != sorted(windows[:, 0].tolist())


def test_the_same_seed_draws_the_same() -> None:
    draws = [draw_windows(tokens(), num_samples=8, seq_length=9, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_halves_share_nothing() -> None:
    given = context(tiny("llama"), num_samples=7)
    assert torch.equal(torch.cat([given.part("fit"), given.part("held_out")]), given.part("all"))
    assert (len(given.part("fit")), len(given.part("held_out"))) == (3, 4)


def test_batches_fit_the_memory_and_keep_the_order() -> None:
    given = context(tiny("llama"), num_samples=7, memory_gib=7e-5)
    batches = list(given.batches("all", title=""))
    assert 1 < len(batches) < 7
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), given.windows[:, :-1])
    assert torch.equal(torch.cat([labels for _, labels in batches]), given.windows[:, 1:])


def test_a_model_in_training_mode_is_measured_without_dropout() -> None:
    dropping = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    (score,) = find_scores(["causal"])
    expected = score.run(context(dropping)).values
    assert score.run(context(dropping.train())).values == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "--samples 0: must be at least 1"),
        ({"seq_length": 65}, r"--seq-length 65: the model takes at most 64 \(max_position_embeddings\)"),
        ({"num_samples": 401}, "4000 tokens hold 400 sequences of 10 tokens, fewer than --samples 401"),
        ({"memory_gib": 0.0}, "--memory-gib 0.0: must be above 0"),
        ({"processes": Processes(0, 3)}, "--nproc 3: each process needs a sequence of either half of --samples 4"),
    ],
)
def test_impossible_samples_are_refused(changes: dict[str, Any], message: str) -> None:
    sizes = {"num_samples": 4, "seq_length": 9, "seed": 0} | changes
    with pytest.raises((ConfigError, DataError), match=message):
        make_context(tiny("llama"), tokens(), **sizes)


def test_tokens_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="token id 70 in the data, but the model's vocabulary has 67 entries"):
        make_context(tiny("llama"), torch.full((100,), 70), num_samples=2, seq_length=9, seed=0)


def test_a_trace_stops_before_the_head_and_losses_are_the_models_own() -> None:
    given = context(tiny("gemma2"))
    calls: list[int] = []
    handle = given.layers.head.register_forward_hook(lambda *_: calls.append(1))
    (trace,) = given.traces("all", title="")
    assert not calls
    losses = given.replay.losses(trace)
    handle.remove()
    assert len(calls) == 1
    assert float(losses.mean()) == pytest.approx(naive.mean_loss(given.model, given.windows), rel=1e-6)


def test_one_sequence_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="--samples 1: a score that fits"):
        context(tiny("llama"), num_samples=1).part("fit")


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "names no score"), (["causal", "depth"], "depth: no such score"), (["skip", "skip"], "given twice")],
)
def test_unknown_scores_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_scores(names)


def test_every_registered_score_bears_its_name() -> None:
    assert [score.name for score in find_scores(list(SCORES))] == list(SCORES)
