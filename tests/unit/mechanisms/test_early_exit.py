"""Early exits: weights of layers, gradients of an independent model through recompute, and what cannot be combined."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.residual.early_exit import EarlyExit
from sparsecod_megatron.seams.plugin import StepContext
from tests.dist.layouts import FULL_RECOMPUTE
from tests.helpers.megatron import SMALL
from tests.helpers.reference_gpt import forward
from tests.helpers.training import small_trainer

select_backend()
TOKENS, LABELS = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(3))
EXITS = "mechanisms.early_exit.scale=0.5"
TIED = "model.untie_embeddings_and_output_weights=false"


def test_weights_by_hand() -> None:
    """1, 3, 6 halved and the last layer's 10; by turns; the last alone."""
    model = load_config(None, [*SMALL, "model.num_layers=4"], mechanisms=MECHANISMS).model
    assert EarlyExit(scale=0.5).weights(model, 9) == pytest.approx({0: 0.5 / 15, 1: 1.5 / 15, 2: 3 / 15, 3: 10 / 15})
    turns = [EarlyExit(scale=1, rotation=2).weights(model, step) for step in (1, 2, 3)]
    assert turns[0] == turns[2] == pytest.approx({0: 1 / 17, 2: 6 / 17, 3: 10 / 17})
    assert turns[1] == pytest.approx({1: 3 / 13, 3: 10 / 13})
    assert EarlyExit(scale=0).weights(model, 1) == {3: 1.0}


@pytest.mark.parametrize(
    "overrides",
    [(), FULL_RECOMPUTE, (*FULL_RECOMPUTE, "megatron.recompute_num_layers=3", TIED), ("model.norm_placement=post",)],
    ids=["plain", "full-recompute", "recompute-of-several-tied", "post"],
)
def test_gradients_of_a_plain_model(overrides: tuple[str, ...]) -> None:
    """Σ ẽ CE of every block's output, with a token that does not count; the loss itself is the last layer's."""
    overrides = (*overrides, "model.init_method_std=0.2")
    counts = torch.ones(2, 16)
    counts[0, 5] = 0
    with small_trainer(EXITS, *overrides) as trainer:
        model, (plugin,) = trainer.models[0].module, trainer.plugins
        trainer.models[0].zero_grad_buffer()
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        positions = torch.arange(16).expand_as(TOKENS)
        with plugin.extra_loss(StepContext(1, 9), 1):
            losses = trainer.models[0](TOKENS, positions, None, labels=LABELS)
            (losses * counts).sum().backward()
        found = {name: weight.main_grad.clone() for name, weight in model.named_parameters()}
        config, head = trainer.config.model, "output_layer.weight"
    logits, blocks = forward(config, weights, TOKENS)
    output = weights[head if head in weights else "embedding.word_embeddings.weight"]
    norm = weights["decoder.final_layernorm.weight"]
    every = [
        norm * block / (block.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() @ output.T
        for block in blocks
    ]
    torch.testing.assert_close(every[-1], logits)
    entropies = [F.cross_entropy(each.flatten(0, 1), LABELS.flatten(), reduction="none").view(2, 16) for each in every]
    torch.testing.assert_close(losses, entropies[-1], rtol=1e-5, atol=1e-5)
    shares = (0.5 / 8, 1.5 / 8, 6 / 8)
    sum((share * entropy * counts).sum() for share, entropy in zip(shares, entropies, strict=True)).backward()
    for name, weight in weights.items():
        assert weight.grad is not None and bool(weight.grad.any()), name
        torch.testing.assert_close(
            found[name], weight.grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.pipeline_model_parallel_size=3"],
            "size: 3, but the exits of mechanisms.early_exit need the output",
        ),
        (["mechanisms.siamese_norm={}"], "early_exit: the residual path has 2 vectors per token, and exits read one"),
        (['mechanisms.distillation.teacher=":fresh:"'], "early_exit: distillation watches the same output layer"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, EXITS, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
