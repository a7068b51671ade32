"""CompleteP: what each parameter's step is, what depth does to a step; and branches' factors in exported weights."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL, run_forward
from tests.helpers.training import small_trainer, trainer_batches

select_backend()

EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24", "model.moe_first_k_dense_layers=1")
VECTORS = ("model.qk_norm=true", "model.qkv_bias=true", "model.embedding_norm=true")
DEEP = ("model.num_layers=4", "model.mup_base_hidden_size=8")
WIDTH, DEPTH = 4.0, 2.0


def complete_p(alpha: float, base: int = 2) -> str:
    return f"mechanisms.complete_p={{base_num_layers: {base}, alpha: {alpha}}}"


def expected_factors(name: str, alpha: float) -> tuple[float, float, float]:
    """Of learning rate, decay and ε, from the formulas and the last parts of a name."""
    rate, decay, epsilon = 1.0, 1.0, 1 / WIDTH
    if re.search(r"(linear_\w+|output_layer|router)\.weight$", name):
        rate, decay = 1 / WIDTH, WIDTH
    if re.search(r"(output_layer|router|[qk]_layernorm)\.weight$", name):
        epsilon = 1.0
    if ".layers." in name:
        rate, epsilon = rate * DEPTH ** (alpha - 1), epsilon * DEPTH**-alpha
    return rate, decay, epsilon


@pytest.mark.parametrize("model", [VECTORS, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_what_a_step_does_to_every_parameter(model: tuple[str, ...], alpha: float) -> None:
    """AdamW's first step with a gradient g of the order of ε: w (1 − lr · decay) − lr · g / (g + ε)."""
    lr, decay, eps, gradient = 0.1, 0.5, 1e-3, 1e-3
    settings = (f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}", f"optimizer.adam_eps={eps}")
    schedule = ("schedule.lr_decay_style=constant", "optimizer.no_weight_decay=[]")
    with small_trainer(*model, *DEEP, *settings, *schedule, complete_p(alpha)) as trainer:
        before = {name: weight.detach().clone() for name, weight in trainer.models[0].named_parameters()}
        for parameter in trainer.models[0].parameters():
            parameter.main_grad.fill_(gradient)
        trainer.scheduler.step(increment=1)
        trainer.optimizer.prepare_grads()
        trainer.optimizer.step_with_ready_grads()
        for name, weight in trainer.models[0].named_parameters():
            rate, decays, epsilon = expected_factors(name, alpha)
            moved = lr * rate * gradient / (gradient + eps * epsilon)
            expected = before[name] * (1 - lr * rate * decay * decays) - moved
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6, msg=f"{name} moves otherwise")


def test_a_smaller_output_layer_is_smaller_logits() -> None:
    """The paper's logits over r with ε / r, and a layer over r with lr / r, decay · r and ε: one trajectory."""
    generator = torch.Generator().manual_seed(0)
    start, inputs = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    target, r, found = torch.randn(5, 5, generator=generator, dtype=torch.float64), 8.0, []
    for divided, eps, lr, decay in ((r, 1e-2 / r, 1e-1, 0.3), (1.0, 1e-2, 1e-1 / r, 0.3 * r)):
        weight = torch.nn.Parameter(start.clone() if divided == r else start / r)
        optimizer = torch.optim.AdamW([weight], lr=lr, eps=eps, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            (inputs @ weight.T / divided - target).square().sum().backward()
            optimizer.step()
        found.append(weight.detach() / divided)
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], start / r, rtol=0.05)


def test_epsilon_survives_a_checkpoint(tmp_path: Path) -> None:
    """Groups that differ in ε alone, which Megatron-Core would take for one; a resumed run is the same bit for bit."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    settings = ("model.num_layers=4", "optimizer.adam_eps=1e-2", "optimizer.no_weight_decay=[]", complete_p(1.0))

    def epsilons(trainer: Any) -> list[float]:
        return [group["eps"] for group in trainer.optimizer.param_groups if group["params"]]

    with small_trainer(*settings) as trainer:
        data = trainer_batches(trainer)
        train_step(trainer, data)
        own = epsilons(trainer)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
        expected = train_step(trainer, data).loss, train_step(trainer, data).loss
    assert sorted(own) == [5e-3, 1e-2]
    with small_trainer(*settings, "train.seed=7") as trainer:
        data = trainer_batches(trainer)
        load_checkpoint(saved, trainer)
        assert epsilons(trainer) == own
        for iterator in data:
            next(iterator), next(iterator)
        assert (train_step(trainer, data).loss, train_step(trainer, data).loss) == expected


def change_of_branches(layers: int, *overrides: str) -> float:
    """RMS of what one step of AdamW changes in the sum of all branches."""
    from sparsecod_megatron.model import unwrap
    from sparsecod_megatron.train.step import train_step

    small = ("optimizer.lr=1e-4", "optimizer.adam_eps=1e-15", "optimizer.weight_decay=0")
    # Branches that are small beside the embedding, whose norms' slopes are then the same at every depth.
    start = ("model.init_method_std=0.03", "model.init_std.embedding=1", "schedule.lr_decay_style=constant")
    with small_trainer(f"model.num_layers={layers}", *small, *start, *overrides) as trainer:
        tokens, model = next(trainer_batches(trainer)[0])["tokens"], unwrap(trainer.models[0])
        before = sum_of_branches(model, tokens)
        train_step(trainer, trainer_batches(trainer))
        return float((sum_of_branches(model, tokens) - before).square().mean().sqrt())


def sum_of_branches(model: Any, tokens: Tensor) -> Tensor:
    """[S, B, H]: the last residual stream without the embedding."""
    seen: list[Tensor] = []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        handles = (
            model.embedding.register_forward_hook(lambda module, args, out: seen.append(out)),
            model.decoder.final_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        )
        for handle in handles:
            hooks.callback(handle.remove)
        run_forward(model, tokens)
    return seen[1] - seen[0]


def slopes(overrides: Any, depths: tuple[int, ...]) -> list[float]:
    """Exponents of depth between neighbours."""
    changes = [change_of_branches(layers, *overrides(layers)) for layers in depths]
    return [math.log(b / a) / math.log(4) for a, b in zip(changes, changes[1:], strict=False)]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_coordinate_check(alpha: float) -> None:
    """A step changes as much at every depth."""
    for slope in slopes(lambda layers: [complete_p(alpha, base=4)], (4, 16, 64)):
        assert abs(slope) < 0.1


def test_coordinate_check_of_the_multiplier_alone() -> None:
    """With the same learning rate at every depth, L branches of m^-α change by L^(1 − α)."""
    (half,) = slopes(lambda layers: [f"mechanisms.scaled.branch={(layers / 4) ** -0.5}"], (16, 64))
    (plain,) = slopes(lambda layers: [], (16, 64))
    assert (half, plain) == pytest.approx((0.5, 1.0), abs=0.1)


def saved_with_logits(folder: Path, tokens: Tensor, *overrides: str) -> tuple[Path, Tensor]:
    """A checkpoint whose learned factors are drawn, and what its model computes."""
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.model import unwrap
    from sparsecod_megatron.seams.plugin import StepContext, effective_weights

    with small_trainer("model.init_method_std=0.2", *overrides) as trainer:
        for name, parameter in trainer.models[0].named_parameters():
            if name.endswith(".write.factor"):
                torch.nn.init.normal_(parameter)
        trainer.optimizer.reload_model_params()
        step = save_checkpoint(folder, trainer, state=TrainState(step=1))
        context = StepContext(1, trainer.config.train.train_steps)
        with torch.no_grad(), effective_weights(trainer.plugins, context):
            logits = run_forward(unwrap(trainer.models[0]).eval(), tokens)
    return step, logits


HALF, CHANNELS = "mechanisms.scaled.branch=0.5", "mechanisms.scaled={branch: 0.5, learn: channel}"
OTHERS = {
    "plain": (),
    "biases": ("model.qkv_bias=true", "model.attention_output_bias=true", "model.mlp_bias=true"),
    "post": ("model.norm_placement=post",),
    "mix": ("model.norm_placement=mix", "model.num_layers=4"),
    "experts": (*EXPERTS, "model.moe_shared_expert_intermediate_size=24", "model.moe_shared_expert_gate=true"),
    # Matrices from factors, masks that follow the size of stored weights, and experts inside an MLP's matrices.
    "sltrain": ("mechanisms.sltrain={rank: 4, alpha: 8, density: 0.25}",),
    "ste": ("mechanisms.ste.pattern=1:4",),
    "monet": ("mechanisms.monet={experts: 8, heads: 2, k: 3}", "model.activation=relu2"),
}


@pytest.mark.parametrize(
    ("other", "factor"),
    [
        *((other, HALF) for other in OTHERS),
        *((other, CHANNELS) for other in ("biases", "mix", "experts", "sltrain", "ste")),
    ],
)
def test_folded_factors_leave_the_function(other: str, factor: str, tmp_path: Path) -> None:
    """Bit for bit, where they are powers of two."""
    from sparsecod_megatron.checkpoint.whole import whole_model

    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    step, logits = saved_with_logits(tmp_path, tokens, factor, *OTHERS[other])
    with whole_model(step, select_backend()) as whole:
        folded = whole.logits(tokens)
        assert not any(name.endswith(".factor") for name, _ in whole.model.named_parameters())
    if factor == HALF:
        assert torch.equal(folded, logits)
    torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "architecture"),
    [
        ((HALF,), "LlamaForCausalLM"),
        ((CHANNELS, "model.qk_norm=true"), "Qwen3ForCausalLM"),
        ((complete_p(0.5), "model.num_layers=4"), "LlamaForCausalLM"),
        (("mechanisms.scaled.skip=0.5",), "SparsecodForCausalLM"),
        ((HALF, "model.norm_placement=sandwich"), "SparsecodForCausalLM"),
    ],
)
def test_exported_class(overrides: tuple[str, ...], architecture: str, tmp_path: Path) -> None:
    """Verified against the folded model; without the fold, against the trained one."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint

    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    step, logits = saved_with_logits(tmp_path, tokens, *overrides)
    assert export_checkpoint(step, tmp_path / "hf") is not None
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [architecture]
    if architecture != "SparsecodForCausalLM":
        from transformers import AutoModelForCausalLM

        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits[..., :64], logits[..., :64], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.complete_p={}"], "mechanisms.complete_p.base_num_layers: not set; give the number of layers"),
        ([complete_p(1.0), "model.init=scaled"], "model.init: scaled makes branches small at depth"),
        ([complete_p(1.0), "model.init=mitchell"], "model.init: mitchell makes branches small at depth"),
        ([complete_p(1.0), "model.init=small_init"], "model.init: small_init makes branches small at depth"),
        ([complete_p(1.0), "model.layernorm_scaling=true"], "model.layernorm_scaling: true makes branches small"),
        ([complete_p(1.0), "optimizer.optimizer=muon"], "optimizer.optimizer: muon, but the learning rates"),
        ([complete_p(1.0), "model.norm_placement=peri"], "norm_placement: peri, but mechanisms.complete_p takes pre"),
        ([complete_p(1.0), "mechanisms.scaled={}"], "the residual path is mechanisms.complete_p's; keep one of them"),
        ([complete_p(1.5)], "mechanisms.complete_p.alpha: 1.5"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert words in str(refused.value) and "\n" not in str(refused.value)
