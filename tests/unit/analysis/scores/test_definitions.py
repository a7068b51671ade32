"""Every score against the plain implementation of its definition, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BambaConfig, BambaForCausalLM

from sparsecod_megatron.analysis.scores import similarity
from sparsecod_megatron.analysis.scores.base import Result
from sparsecod_megatron.analysis.scores.causal import Causal
from sparsecod_megatron.analysis.scores.lens import Lens
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.similarity import Similarity
from sparsecod_megatron.analysis.scores.skip import Skip
from sparsecod_megatron.analysis.scores.usefulness import Usefulness
from tests.unit.analysis.scores import naive
from tests.unit.analysis.scores.families import ALL_FAMILIES, FAMILIES, NUM_LAYERS, context, tiny

CLOSE = 1e-4


def column(result: Result, table: str, name: str) -> np.ndarray:
    return np.array([row[name] for row in result.tables[table]], dtype=np.float64)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_causal(family: str) -> None:
    given = context(tiny(family))
    result = Causal().run(given)
    effect, largest = naive.causal(given.model, given.layers.blocks, given.windows)
    upper = np.triu_indices(NUM_LAYERS, k=1)
    assert [(row["skipped"], row["layer"]) for row in result.tables["causal"]] == list(zip(*upper, strict=True))
    assert column(result, "causal", "causal") == pytest.approx(effect[upper], rel=CLOSE)
    assert column(result, "causal", "max") == pytest.approx(largest[upper], rel=CLOSE)
    assert result.values["causal"]["value"] == pytest.approx(effect[upper].mean(), rel=CLOSE)
    late = effect[upper][upper[0] >= NUM_LAYERS // 2]
    assert result.values["causal_second_half"]["value"] == pytest.approx(late.mean(), rel=CLOSE)
    assert result.values["causal"]["low"] < effect[upper].mean() < result.values["causal"]["high"]


@pytest.mark.parametrize("family", FAMILIES)
def test_permutation(family: str) -> None:
    given = context(tiny(family))
    result = Permutation().run(given)
    expected = naive.permutation(given.model, given.layers.blocks, given.windows)
    upper = np.triu_indices(NUM_LAYERS, k=1)
    assert column(result, "permutation", "permutation") == pytest.approx(expected[upper], abs=CLOSE)
    assert result.values["permutation"]["value"] == pytest.approx(expected[upper].mean(), abs=CLOSE)
    assert result.values["ref_permutation"]["value"] == pytest.approx(np.abs(expected[upper]).mean(), abs=CLOSE)
    assert expected[upper].min() < -10 * CLOSE or expected[upper].max() > 10 * CLOSE  # there is something to find


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_usefulness(family: str) -> None:
    given = context(tiny(family), num_samples=16, reference=True)
    result = Usefulness().run(given)
    for name, transposed in (("usefulness", False), ("ref_usefulness", True)):
        expected = naive.usefulness(
            given.model, given.layers.blocks, given.windows[:8], given.windows[8:], transposed=transposed
        )
        assert column(result, "usefulness", name) == pytest.approx(expected, rel=CLOSE)
        if not transposed:
            assert result.values["mean_log_usefulness"]["value"] == pytest.approx(np.log(expected).mean(), abs=CLOSE)
            late = np.log(expected[NUM_LAYERS // 2 :]).mean()
            assert result.values["mean_log_usefulness_second_half"]["value"] == pytest.approx(late, abs=CLOSE)
            assert result.values["useful_share"]["value"] == pytest.approx((expected > 1.1).mean())
    assert result.num_sequences == 8


def test_a_model_that_unpacks_its_blocks_tuples() -> None:
    """Bamba's blocks answer (hidden states, attention weights), and the model takes both."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    config = BambaConfig(vocab_size=67, num_hidden_layers=NUM_LAYERS, attn_layer_indices=[1], **sizes, **mixer)
    torch.manual_seed(1)
    given = context(BambaForCausalLM(config))
    expected = naive.skip_loss(given.model, given.layers.blocks, given.windows)
    assert column(Skip().run(given), "skip", "skip_loss") == pytest.approx(expected, abs=CLOSE)
    assert np.abs(expected).max() > CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_skip(family: str) -> None:
    given = context(tiny(family))
    result = Skip().run(given)
    assert column(result, "skip", "skip_loss") == pytest.approx(
        naive.skip_loss(given.model, given.layers.blocks, given.windows), abs=CLOSE
    )
    late = column(result, "skip", "skip_loss")[NUM_LAYERS // 2 :].mean()
    assert result.values["skip_loss_second_half"]["value"] == pytest.approx(late)
    hidden, _ = naive.run(given.model, given.layers.blocks, given.windows)
    turns = [1 - F.cosine_similarity(hidden[i], hidden[i + 1], dim=-1).mean() for i in range(NUM_LAYERS)]
    assert column(result, "skip", "block_influence") == pytest.approx(np.array(turns), abs=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_lens(family: str) -> None:
    given = context(tiny(family))
    result = Lens().run(given)
    hidden, final = naive.run(given.model, given.layers.blocks, given.windows)
    final_log = final.log_softmax(-1)
    for layer in range(NUM_LAYERS):
        with naive.edited(given.layers.blocks[-1], lambda _before, _after, kept=hidden[layer + 1]: kept):  # type: ignore[misc]
            _, early = naive.run(given.model, given.layers.blocks, given.windows)
        kl = F.kl_div(final_log, early.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        rows, others = early.topk(5).indices.flatten(0, 1).tolist(), final.topk(5).indices.flatten(0, 1).tolist()
        shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, others, strict=True)])
        delta = hidden[layer + 1] - hidden[layer]
        row = result.tables["lens"][layer]
        assert row["kl"] == pytest.approx(float(kl), rel=CLOSE, abs=1e-6)
        assert row["top5_overlap"] == pytest.approx(shared)
        cosine = F.cosine_similarity(delta, hidden[layer], dim=-1).mean()
        assert row["residual_cosine"] == pytest.approx(float(cosine), abs=CLOSE)
    kls = column(result, "lens", "kl")
    depth = (int(np.flatnonzero(kls < kls.max() / 2)[0]) + 1) / NUM_LAYERS
    assert result.values["effective_depth_kl"]["value"] == pytest.approx(depth)
    assert kls[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_similarity(family: str) -> None:
    given = context(tiny(family))
    result = Similarity().run(given)
    hidden, _ = naive.run(given.model, given.layers.blocks, given.windows)
    outputs = [layer.flatten(0, 1).double() for layer in hidden[1:]]
    for row in result.tables["similarity"]:
        x, y = outputs[row["first"]], outputs[row["second"]]
        assert row["cosine"] == pytest.approx(float(F.cosine_similarity(x.mean(0), y.mean(0), dim=0)), abs=1e-6)
        x, y = x - x.mean(0), y - y.mean(0)
        cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
        assert row["cka"] == pytest.approx(float(cka), abs=CLOSE)
        assert row["cka_low"] <= row["cka_high"]


def test_micro_batches_change_nothing() -> None:
    model = tiny("llama")
    whole, single = context(model), context(model, memory_gib=1e-9)
    assert (whole.micro_batch, single.micro_batch) == (64, 1)
    for score in (Causal(), Permutation(), Usefulness(), Similarity(), Skip(), Lens()):
        first, second = (score.run(given).tables[score.name] for given in (whole, single))
        for one, other in zip(first, second, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)


def test_blocks_are_back_in_place_afterwards() -> None:
    given = context(tiny("llama"), reference=True)
    blocks, implementation = list(given.layers.blocks), given.model.config._attn_implementation
    before = naive.mean_loss(given.model, given.windows)
    for score in (Causal(), Permutation(), Usefulness(), Similarity(), Skip(), Lens()):
        score.run(given)
    assert list(given.layers.blocks) == blocks
    assert given.model.config._attn_implementation == implementation
    assert naive.mean_loss(given.model, given.windows) == before


def test_cka_of_a_resample_is_that_of_repeated_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)
    owners, counts = np.arange(12) % 4, np.array([[2, 0, 1, 3], [1, 1, 1, 1]])
    found = similarity._weighted_cka(similarity._centred_grams(kept), owners)(counts.astype(float))
    for resample, row in enumerate(counts):
        repeated = kept.repeat_interleave(torch.from_numpy(row[owners]), dim=1)
        x = repeated - repeated.mean(1, keepdim=True)
        products = [[float((x[a].T @ x[b]).norm() ** 2) for b in range(3)] for a in range(3)]
        expected = [[products[a][b] / (products[a][a] * products[b][b]) ** 0.5 for b in range(3)] for a in range(3)]
        np.testing.assert_allclose(found[resample], expected, rtol=1e-5)
