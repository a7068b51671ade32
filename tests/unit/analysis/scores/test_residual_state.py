"""Scores of models whose residual state is more than a stream: as of the plain model where it is one, n times over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.isolation import isolated
from sparsecod_megatron.analysis.jacobians import token_jacobians
from sparsecod_megatron.analysis.scores.base import Result
from sparsecod_megatron.analysis.scores.causal import Causal
from sparsecod_megatron.analysis.scores.jacobian import Jacobian
from sparsecod_megatron.analysis.scores.lens import Lens
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.similarity import Similarity
from sparsecod_megatron.analysis.scores.skip import Skip
from sparsecod_megatron.analysis.scores.usefulness import Usefulness
from sparsecod_megatron.mechanisms.exports import know_extensions
from tests.unit.analysis.scores.families import context

STREAMS = {"hyper_connections": {"streams": 4, "scale": 0.01}}
SLOTS = {"attention_residuals": {"block_layers": 1}}
LAYERS = 4


def model_with(mechanisms: dict[str, Any]) -> PreTrainedModel:
    """A model of our own class; the same weights whatever the path."""
    from sparsecod_megatron.hf.configuration_sparsecod import SparsecodConfig
    from sparsecod_megatron.hf.modeling_sparsecod import SparsecodForCausalLM

    know_extensions()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    model = SparsecodForCausalLM(SparsecodConfig(vocab_size=67, mechanisms=mechanisms, rms_norm_eps=1e-12, **sizes))
    for index, (name, parameter) in enumerate(sorted(plain_parameters(model).items())):
        generator = torch.Generator().manual_seed(index)
        parameter.data = torch.randn(parameter.shape, generator=generator) * (1.0 if "norm" in name else 0.3)
    return model.eval().requires_grad_(False)


def plain_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Those that the plain model has too."""
    own = ("_residual", "expansion", "contraction")
    return {name: value for name, value in model.named_parameters() if not any(part in name for part in own)}


def values(result: Result) -> dict[str, float]:
    """Every number of a score."""
    found = {name: value["value"] if isinstance(value, dict) else value for name, value in result.values.items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("mechanisms", [STREAMS, SLOTS], ids=["streams", "slots"])
@pytest.mark.parametrize("score", [Causal, Usefulness, Skip, Lens, Permutation, Similarity])
def test_a_path_that_is_the_plain_stream_scores_as_it(score: Any, mechanisms: dict[str, Any]) -> None:
    """Hyper-connections as they begin; slots whose reads are means, which norms make sums."""
    plain, own = (score().run(context(model_with(given), num_samples=16)) for given in ({}, mechanisms))
    assert values(own) == pytest.approx(values(plain), rel=2e-3, abs=2e-5)


def test_permutation_trades_branches_and_leaves_slots() -> None:
    """A model whose branches were exchanged by hand; queries are not zero, so that slots matter."""
    model = model_with(SLOTS)
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("query"):
                parameter.data = torch.randn(16, generator=torch.Generator().manual_seed(len(name)))
    given = context(model, num_samples=4)
    rows = {(row["first"], row["second"]): row["permutation"] for row in Permutation().run(given).tables["permutation"]}

    def loss() -> float:
        logits = model(input_ids=given.windows[:, :-1], use_cache=False).logits
        return float(F.cross_entropy(logits.flatten(0, 1), given.windows[:, 1:].flatten()))

    base, layers = loss(), model.model.layers
    for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        kept = getattr(layers[0], part)
        setattr(layers[0], part, getattr(layers[2], part))
        setattr(layers[2], part, kept)
    assert rows[0, 2] == pytest.approx((loss() - base) / base, abs=1e-4) and abs(rows[0, 2]) > 1e-3


def test_usefulness_replaces_the_branches_of_a_path_alone() -> None:
    """Branches that are zero are an affine map: replacing them changes nothing, though streams are mixed."""
    model = model_with(STREAMS)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        mixing = layer.mlp_residual.write.static_mixing
        mixing.data = torch.rand(4, 4, generator=torch.Generator().manual_seed(index))
    rows = Usefulness().run(context(model, num_samples=16)).tables["usefulness"]
    assert np.array([row["usefulness"] for row in rows]) == pytest.approx(np.ones(LAYERS), abs=1e-5)


def test_the_jacobian_of_equal_streams_is_the_plain_one() -> None:
    """Hyper-connections as they begin, by whole Jacobians, by estimates, and by the reference's."""
    for exact in (True, False):
        plain, own = (
            Jacobian(exact=exact).run(context(model_with(given), num_samples=2, reference=True))
            for given in ({}, STREAMS)
        )
        assert values(own) == pytest.approx(values(plain), rel=1e-4) and values(own)["jacobian_deviation"] > 0.1
        assert len(values(own)) == len(values(plain))


def branch_jacobians(
    block: Any, call: Any, reads: list[torch.Tensor], row: int, place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of attention and MLP by themselves, by a token's read; the other tokens of its sequence read what they do."""
    rotation, mask, cache = call.args

    def attention(token: torch.Tensor) -> torch.Tensor:
        whole = reads[0][row : row + 1].clone()
        whole[0, place] = token
        causal = None if mask is None else mask[:1]
        attended: torch.Tensor = block.self_attn(block.input_layernorm(whole), rotation, causal, cache)[0]
        return attended[0, place]

    def mlp(token: torch.Tensor) -> torch.Tensor:
        written: torch.Tensor = block.mlp(block.post_attention_layernorm(token))
        return written

    own = [read[row, place] for read in reads]
    of_attention, of_mlp = (
        torch.autograd.functional.jacobian(branch, token) for branch, token in zip((attention, mlp), own, strict=True)
    )
    return of_attention, of_mlp


TWINS: dict[str, Any] = {"siamese_norm": {}}


@pytest.mark.parametrize("mechanisms", [STREAMS, SLOTS, TWINS], ids=["streams", "slots", "twins"])
def test_a_jacobian_is_the_product_of_the_branches_own(mechanisms: dict[str, Any]) -> None:
    """(I + J_MLP) (I + J_attention) of one token, each of the branch by itself at what it reads in the model."""
    model = model_with(mechanisms)
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "_residual" in name:  # streams that differ, and are mixed
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data += 0.2 * drawn
    given = context(model, num_samples=2)
    trace = next(given.traces("all", title=""))
    rows, positions = torch.arange(2), torch.tensor([[0, 6], [5, 3]])
    for layer in range(LAYERS):
        with isolated(given.replay, trace, layer) as apart:
            apart.check(rows, positions)
            found = token_jacobians(apart, rows, positions)
        block, reads = model.model.layers[layer], list[torch.Tensor]()
        hooks = [
            part.register_forward_hook(lambda _module, _inputs, read, into=reads: into.append(read.detach()))
            for part in (block.attention_residual, block.mlp_residual)
        ]
        given.replay.run_block(trace, layer, trace.hidden[layer])
        for hook in hooks:
            hook.remove()
        for row, places in enumerate(positions.tolist()):
            for column, place in enumerate(places):
                of_attention, of_mlp = branch_jacobians(block, trace.calls[layer], reads, row, place)
                expected = (torch.eye(16) + of_mlp) @ (torch.eye(16) + of_attention)
                assert (expected - torch.eye(16)).norm() > 0.5
                torch.testing.assert_close(found[row, column], expected, rtol=1e-3, atol=1e-4)
