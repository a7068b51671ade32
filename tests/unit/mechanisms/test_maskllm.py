"""MaskLLM: gradients against autograd, the best of six masks, priors, and what it freezes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.weights.engine import mask_choices
from sparsecod_megatron.mechanisms.weights.engine.patterns import exceeding_groups, smallest_of_each
from tests.helpers.hf_models import write_llama
from tests.helpers.megatron import SMALL
from tests.helpers.training import small_trainer, trainer_batches

PLAIN = ("optimizer.weight_decay=0", "model.init_method_std=0.1")


def test_the_gradient_is_autograd_s() -> None:
    torch.manual_seed(0)
    logits = (0.01 * torch.randn(7, 6)).requires_grad_()
    noise, weights, slope = mask_choices.gumbel(torch.arange(7), 0, 3), torch.randn(28), torch.randn(28)
    chosen = mask_choices.probabilities(logits, noise, scale=200.0, temperature=2.0)
    effective = weights * mask_choices.mixture(chosen).flatten()
    (effective @ slope - 0.1 * effective.square().sum()).backward()
    found = mask_choices.logit_gradient(chosen.detach(), weights, slope, scale=200.0, temperature=2.0, regularizer=0.1)
    torch.testing.assert_close(found, logits.grad)


def test_a_quadratic_loss_leads_to_the_best_of_six() -> None:
    """Groups of four weights with a curvature of their own, by brute force; the schedules of the paper."""
    torch.manual_seed(1)
    count, steps = 24, 400
    factors = torch.randn(count, 4, 4)
    curvature, weights = factors @ factors.transpose(1, 2), torch.randn(count, 4)

    def slope(mask: torch.Tensor) -> torch.Tensor:
        return ((mask - 1) * weights)[:, None] @ curvature

    options = mask_choices.masks(weights)
    missing = (options[None] - 1) * weights[:, None]
    losses = torch.einsum("gki,gij,gkj->gk", missing, curvature, missing)
    logits = torch.nn.Parameter(0.01 * mask_choices.normal(torch.arange(count), 0))
    adam = torch.optim.Adam([logits], lr=2e-3)
    for step in range(steps):
        share = step / (steps - 1)
        scale, temperature = 1e2 + share * 4e2, 4 + share * (0.05 - 4)
        noise = mask_choices.gumbel(torch.arange(count), 0, step)
        chosen = mask_choices.probabilities(logits.detach(), noise, scale=scale, temperature=temperature)
        gradient = 2 * slope(mask_choices.mixture(chosen)).squeeze(1)
        logits.grad = mask_choices.logit_gradient(
            chosen, weights.flatten(), gradient.flatten(), scale=scale, temperature=temperature, regularizer=0.0
        )
        adam.step()
    found = losses.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    best, order = losses.min(1).values, losses.sort(1).values
    clear = order[:, 1] > 1.5 * order[:, 0]
    assert clear.sum() > count / 2
    assert torch.equal(found[clear], best[clear])


def test_noise_is_gumbel_s_and_belongs_to_places() -> None:
    groups = torch.arange(40_000)
    noise = mask_choices.gumbel(groups, 5, 7).double()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.equal(mask_choices.gumbel(groups[9:12], 5, 7), noise[9:12].float())
    assert not torch.equal(mask_choices.gumbel(groups[:3], 5, 8), noise[:3].float())
    drawn = mask_choices.normal(groups, 5).double()
    assert drawn.mean() == pytest.approx(0, abs=0.01) and drawn.std() == pytest.approx(1, rel=0.02)


def test_logits_survive_the_form_of_a_checkpoint() -> None:
    logits = torch.randn(5, 6)
    assert torch.equal(mask_choices.joined(*mask_choices.halves(logits)), logits)


def test_a_strong_prior_is_the_mask_and_the_rest_is_frozen(tmp_path: Path) -> None:
    """Through training, validation, the last step and the exported files."""
    select_backend()
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import evaluate, train_step

    settings = (*PLAIN, "mechanisms.maskllm.prior_strength=1e6", "mechanisms.maskllm.skip_layers=[2]")
    with small_trainer(*settings, "train.train_steps=2") as trainer:
        before = [weight.detach().clone() for weight in trainer.models[0].parameters()]
        data = trainer_batches(trainer)
        train_step(trainer, data)
        assert all(map(torch.equal, before, trainer.models[0].parameters()))
        early = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
        validation = trainer_batches(trainer, seed=1)
        hard = evaluate(trainer, validation, num_steps=1)
        train_step(trainer, data)
        masked = {shard.parameter for _, shard in trainer.plugins[0].places.shards}
        for old, weight in zip(before, trainer.models[0].parameters(), strict=True):
            expected = old.masked_fill(smallest_of_each(old, 2, 4), 0) if weight in masked else old
            assert torch.equal(weight, expected)
        # The model of the last step is the one that validation has measured.
        assert evaluate(trainer, trainer_batches(trainer, seed=1), num_steps=1) == hard
        final = save_checkpoint(tmp_path, trainer, state=TrainState(step=2, optimizer_steps=2))
    assert export_checkpoint(final, tmp_path / "hf", verify=False) is None
    with pytest.raises(ConversionError, match=r"maskllm: the masks become zeros .* last step, 2, .* of step 1; finish"):
        export_checkpoint(early, tmp_path / "none", verify=False)
    with small_trainer(*settings, "train.train_steps=9") as trainer:
        load_checkpoint(final, trainer)
        with pytest.raises(ConfigError, match="the masks of this run became final at its last step, before 9"):
            train_step(trainer, trainer_batches(trainer))


def test_a_pruned_directory_is_a_prior(tmp_path: Path) -> None:
    """Its zeros, of whatever weights they are."""
    pruned = write_llama(tmp_path / "pruned")
    weights = load_file(pruned / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            weight[smallest_of_each(torch.rand(weight.shape, generator=generator), 2, 4)] = 0
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    options = (*PLAIN, "train.train_steps=1", "model.untie_embeddings_and_output_weights=true")
    prior = (f"mechanisms.maskllm.prior={pruned}", "mechanisms.maskllm.prior_strength=1e6")
    with small_trainer(*options, *prior) as trainer:
        from sparsecod_megatron.hf.source import open_source
        from sparsecod_megatron.train.step import train_step

        train_step(trainer, trainer_batches(trainer))
        named = dict(trainer.models[0].module.named_parameters())
        checked = 0
        for name, weight in open_source(pruned).tensors():
            if "decoder.layers" in name and weight.dim() == 2:
                assert torch.equal(named[name] == 0, weight == 0)
                checked += 1
        assert checked == 12
    refused = pytest.raises(ConfigError, match=r"^mechanisms\.maskllm\.prior: nowhere: has no config.json")
    with refused, small_trainer(*options, "mechanisms.maskllm.prior=nowhere"):
        pass


def test_masks_are_learned() -> None:
    """Exactly 2:4 in the end, not the prior's, and better than it."""
    from sparsecod_megatron.train.step import evaluate, train_step

    steps = 40
    options = (*PLAIN, f"train.train_steps={steps}", "optimizer.lr=5e-3", "schedule.lr_decay_style=constant")
    with small_trainer(*options, "mechanisms.maskllm.prior_strength=1") as trainer:
        first = evaluate(trainer, trainer_batches(trainer), num_steps=2)
        data = trainer_batches(trainer)
        priors = [~smallest_of_each(shard.parameter, 2, 4) for _, shard in trainer.plugins[0].places.shards]
        for _ in range(steps):
            assert train_step(trainer, data).verdict.update
        weights = [shard.parameter for _, shard in trainer.plugins[0].places.shards]
        assert all(exceeding_groups(weight, 2, 4) == 0 and (weight == 0).float().mean() == 0.5 for weight in weights)
        assert any(((weight != 0) != prior).any() for weight, prior in zip(weights, priors, strict=True))
        assert evaluate(trainer, trainer_batches(trainer), num_steps=2) < first


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "optimizer.weight_decay: 0.1, but mechanisms.maskllm freezes all weights; set it to 0"),
        ([*PLAIN, "mechanisms.ste.skip_layers=[0,1,2]"], "beside mechanisms.ste, whose weights it would freeze"),
        ([*PLAIN, "evaluation.interval=5", "evaluation.tasks=[arc_easy]"], "evaluation.interval: 5, but masks of"),
        ([*PLAIN, "model.num_moe_experts=2"], "maskllm: model.num_moe_experts=2; it is for dense models"),
        (
            [*PLAIN, "parallel.tensor_model_parallel_size=2", "model.ffn_hidden_size=44"],
            "do not divide the 44 inputs of mlp_output over parallel.tensor_model_parallel_size=2",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(None, [*SMALL, "mechanisms.maskllm={}", *overrides], mechanisms=MECHANISMS)
