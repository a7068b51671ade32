"""The gate's target against loops, a planted pattern that it learns, and what it must not see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.analysis.sparsity.attention import attending
from sparsecod_megatron.analysis.sparsity.seer_gate import (
    Features,
    Gate,
    GatePattern,
    divergence,
    sequence_features,
    train_gates,
    window_ends,
)
from sparsecod_megatron.analysis.sparsity.seer_gate_score import SeerGate
from sparsecod_megatron.analysis.sparsity.selection import block_64
from sparsecod_megatron.analysis.sparsity.sparse_rows import COSTS, SparseAttention
from sparsecod_megatron.errors import ConfigError
from tests.unit.analysis.sparsity.planted_rows import as_call, attend, random_call
from tests.unit.analysis.sparsity.tiny import VOCAB, sample, tiny_model

LONG = {"max_position_embeddings": 512}


def test_features_are_those_of_naive_loops() -> None:
    tokens = 200
    call = next(as_call(random_call(tokens=tokens, window=150, sinks=True)).sequences())
    found = sequence_features(call, [slice(0, 90), slice(90, 91), slice(91, tokens)])
    weights = call.softmax(call.scores(slice(0, tokens), call.spread_over_heads(call.key)))[0].numpy()
    ends = window_ends(tokens).tolist()
    assert ends[-1] == tokens - 1 and ends[0] >= 64 and len(ends) <= 64
    for place, end in enumerate(ends):
        window = range(end - 63, end + 1)
        mean = call.query[0].numpy()[:, window].mean(1)
        np.testing.assert_allclose(found.queries[:, place], mean, rtol=1e-4, atol=1e-5)
        for head in range(4):
            best = [
                max(weights[head, row, 64 * block : 64 * block + 64].max() for row in window)
                if block < end // 64
                else 0
                for block in range(4)
            ]
            np.testing.assert_allclose(found.target[head, place], np.array(best) / sum(best), rtol=1e-5)
    key = call.key[0].numpy()[:, 128:192]
    pooled = np.concatenate([key.max(1), key.min(1), key.mean(1)], -1)
    np.testing.assert_allclose(found.keys[:, 2], pooled, rtol=1e-5)


def planted_features(sequences: int, seed: int, tokens: int = 512) -> tuple[Features, list[dict[str, Tensor]]]:
    """Queries of every block look for one earlier block, by a code that its keys carry."""
    generator, count = torch.Generator().manual_seed(seed), tokens // 64
    calls, features = [], []
    for _ in range(sequences):
        codes = torch.eye(16)[torch.randperm(16, generator=generator)[:count]]
        sought = [int(torch.randint(max(1, block), (1,), generator=generator)) for block in range(count)]
        noise = 0.05 * torch.randn(2, tokens, 16, generator=generator)
        key = codes.repeat_interleave(64, 0) + noise[0]
        query = 60 * (codes[sought].repeat_interleave(64, 0) + noise[1])
        arguments = {name: x[None, None] for name, x in (("query", query), ("key", key), ("value", key))}
        calls.append(arguments)
        features.append(sequence_features(as_call(arguments), [slice(0, tokens)]))
    return Features(*(torch.stack(column) for column in zip(*features, strict=True))), calls


def test_a_planted_pattern_is_learnt_and_found_on_other_sequences() -> None:
    trained, _ = planted_features(24, seed=0)
    other, calls = planted_features(3, seed=1)
    (gate,) = train_gates([trained], 512, steps=150, seed=0)
    with torch.no_grad():
        assert divergence(gate, other, 512) < 0.65 * divergence(None, other, 512)
    module = nn.Identity()
    untrained = Gate(trained, torch.Generator().manual_seed(0))
    recalls = []
    for pattern in (block_64, GatePattern({module: gate}), GatePattern({module: untrained})):
        attention, total = SparseAttention([module]), 0.0
        for arguments in calls:
            with attention.keeping((0,), pattern, 0.3):
                attend(attention, module, arguments)
                costs = dict(zip(COSTS, attention.costs(0)[0].tolist(), strict=True))
            total += costs["recall"] / costs["rows"] / len(calls)
        recalls.append(total)
    oracle, learnt, random = recalls
    assert learnt > oracle - 0.15 and learnt > random + 0.15


def test_the_divergence_of_an_even_gate_is_that_of_the_definition() -> None:
    features, _ = planted_features(1, seed=2)
    rows = []
    for place, end in enumerate(window_ends(512).tolist()):
        target = features.target[0, 0, place, : end // 64].double()
        rows.append(sum(float(mass * (mass * (end // 64)).log()) for mass in target if mass > 0))
    assert float(divergence(None, features, 512)) == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_later_tokens_change_no_earlier_output_and_budget_one_is_dense() -> None:
    model = tiny_model("llama", **LONG)
    blocks = model.model.layers
    tokens = torch.randint(3, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 150:] = (tokens[:, 150:] + 7) % VOCAB
    generator = torch.Generator().manual_seed(0)
    sizes = Features(torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 24), torch.zeros(1))
    pattern = GatePattern({block.self_attn: Gate(sizes, generator) for block in blocks})
    logits = []
    for text, budget in ((tokens, 0.1), (changed, 0.1), (tokens, 1.0)):
        attention = SparseAttention(blocks)
        with torch.no_grad(), attending(model, attention, ""), attention.keeping(range(2), pattern, budget):
            logits.append(model(input_ids=text, use_cache=False).logits)
    assert torch.equal(logits[0][:, :150], logits[1][:, :150])
    assert not torch.equal(logits[0][:, 150:], logits[1][:, 150:])
    model.set_attn_implementation("eager")
    assert torch.equal(logits[2], model(input_ids=tokens, use_cache=False).logits)
    assert not torch.equal(logits[0], logits[2])


def test_the_score_reports_both_halves() -> None:
    context = sample(tiny_model("gpt_oss", **LONG), num_samples=5, seq_length=150)
    result = SeerGate(budgets=(0.5, 0.2), steps=30).run(context)
    values = result.values
    assert result.num_sequences == 3 and len(result.per_sequence["loss_gate_0.2"]) == 3
    assert 0 < values["kl_fit"] < values["kl_even"] and math.isfinite(values["kl_held_out"])
    assert values["recall_gate_0.2"]["value"] <= values["recall_gate_0.5"]["value"] <= 1
    assert values["recall_oracle_0.5"]["value"] > 0.4
    assert len(result.tables["seer_gate_by_layer"]) == 2 * 4 and len(result.tables["seer_gate_training"]) == 2


def test_short_sequences_and_steps_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--seq-length 24: seer_gate tells blocks of 64 tokens apart; give 256"):
        SeerGate().run(sample(tiny_model("llama")))
    for names, steps in ((["skip"], 5), (["seer_gate"], 0)):
        with pytest.raises(ConfigError, match=f"--gate-steps {steps}: a number of steps"):
            find_scores(names, gate_steps=steps)
