"""Values mixed with those of the first layer: formula, gradients through recompute, exports with a cache, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.dist.layouts import FULL_RECOMPUTE, SELECTIVE_RECOMPUTE
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.reference_gpt import assert_same_gradients, forward
from tests.helpers.training import small_trainer, trainer_batches

select_backend()
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
LEARNED = "mechanisms.value_residual={own: 0.75, first: 0.5, learn: true}"


@pytest.mark.parametrize(
    "overrides",
    [
        (LEARNED, "model.qk_norm=true"),
        (LEARNED, "model.attention_output_gate=elementwise"),
        (LEARNED, "mechanisms.headwise_gate={}", *FULL_RECOMPUTE),
        (LEARNED, *SELECTIVE_RECOMPUTE),
        ("mechanisms.value_residual={own: 0, first: 2, start_layer: 2}",),
    ],
    ids=["learned", "gate", "full-recompute", "selective-recompute", "constant"],
)
def test_logits_and_every_gradient_of_a_plain_model(overrides: tuple[str, ...]) -> None:
    """A loop over heads, in which V_1 has its gradient from every layer, whatever is computed again."""
    # Gradients in `.grad`, which the fused accumulation keeps in the data-parallel wrapper's buffer.
    overrides = (*overrides, "model.init_method_std=0.2", "megatron.gradient_accumulation_fusion=false")
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    with megatron_model(*overrides) as model:
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        constant: dict[str, torch.Tensor] = {}
        if LEARNED not in overrides:
            constant = {"decoder.layers.2.self_attention.value_mix.weight": torch.tensor([0.0, 2.0])}
        ours, (theirs, _) = run_forward(model, TOKENS), forward(config.model, weights | constant, TOKENS)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)
        assert_same_gradients(model, weights, ours, theirs)


def test_factors_never_decay_and_are_adams() -> None:
    config = load_config(None, [*SMALL, LEARNED], mechanisms=MECHANISMS)
    kind = ParameterTable.of(config).find("decoder.layers.1.self_attention.value_mix.weight")
    assert kind.group == NEVER_DECAYS and not kind.is_orthogonalised
    from sparsecod_megatron.train.step import train_step

    with small_trainer(LEARNED, "optimizer.optimizer=muon", "optimizer.weight_decay=0.5") as trainer:
        before = [layer.self_attention.value_mix for layer in trainer.models[0].module.decoder.layers]
        assert before[0] is None and torch.equal(before[1].weight, torch.tensor([0.75, 0.5]))
        train_step(trainer, trainer_batches(trainer))
        assert not torch.equal(before[1].weight, torch.tensor([0.75, 0.5]))


@pytest.mark.parametrize("shape", [(), ("model.qk_norm=true",), ("model.attention_output_gate=elementwise",)])
def test_plan_counts_constant_factors(shape: tuple[str, ...]) -> None:
    """The projection is not kept where its values are mixed; the contract test has learned factors."""
    from sparsecod_megatron.planning.layout import layout_of
    from sparsecod_megatron.planning.memory import rank_memory
    from tests.helpers.memory import step_bytes

    sizes = ("model.hidden_size=64", "model.vocab_size=256", "data.seq_length=64", "train.micro_batch_size=2")
    select_backend(cpu_kernels="plain")  # what is planned for
    try:
        with small_trainer("model.num_layers=4", *sizes, *shape, "mechanisms.value_residual={}") as trainer:
            real, config = step_bytes(trainer)["activations"], trainer.config
    finally:
        select_backend(cpu_kernels="fast")
    memory = rank_memory(layout_of(config, 1, transformer_engine=False), 0)
    assert memory.activations + memory.logits == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("placement", ["pre", "post", "hyper_connections"])
def test_a_cache_gives_what_the_whole_sequence_gives(placement: str, tmp_path: Path) -> None:
    """It holds mixed values: V_1 of past tokens is in them. The norm before V_1 is the first layer's own, or none."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.models.loading import load_model

    path = "mechanisms.hyper_connections={streams: 2}"
    shape = path if placement == "hyper_connections" else f"model.norm_placement={placement}"
    with small_trainer(LEARNED, shape, "model.init_method_std=0.2") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
    assert export_checkpoint(saved, tmp_path / "hf") is not None  # verified against the model
    model: Any = load_model(tmp_path / "hf", dtype="float32", device="cpu").eval()
    prompts = TOKENS[:, :6]
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        whole, cache, parts = model(TOKENS, use_cache=False).logits, None, []
        for part in TOKENS.split((7, 1, 5, 3), dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values if "past_key_values" in output else output.cache
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        ours, theirs = (model.generate(prompts, use_cache=use_cache, **options) for use_cache in (True, False))
        assert torch.equal(ours, theirs)


def test_blocks_run_by_themselves() -> None:
    """As depth scores do: V_1 is among their arguments, and running the first one on something else leaves it be."""
    from sparsecod_megatron.hf.blocks import find_layers
    from sparsecod_megatron.hf.calls import Replay
    from sparsecod_megatron.hf.configuration_sparsecod import SparsecodConfig
    from sparsecod_megatron.hf.modeling_sparsecod import SparsecodForCausalLM
    from sparsecod_megatron.mechanisms.exports import know_extensions

    know_extensions()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    settings = {"own": 0.5, "first": 0.5, "learn": False, "start_layer": 1}
    config = SparsecodConfig(vocab_size=64, mechanisms={"value_residual": settings}, initializer_range=0.5, **sizes)
    model = SparsecodForCausalLM(config).eval()
    replay = Replay(model, find_layers(model))
    with torch.no_grad():
        trace = replay.trace(TOKENS, TOKENS)
        value = model.model.layers[0].self_attn.v_proj(model.model.layers[0].input_layernorm(trace.hidden[0]))
        assert torch.equal(trace.calls[2].kwargs["first_values"].flatten(2), value)
        replay.run_block(trace, 0, torch.randn_like(trace.hidden[0]))
        torch.testing.assert_close(replay.run_block(trace, 2, trace.hidden[2]), trace.hidden[3])
        logits = replay.logits(trace, trace.hidden[3])
        torch.testing.assert_close(logits, model(input_ids=TOKENS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pipeline_model_parallel_size=3"], "pipeline_model_parallel_size: 3, but mechanisms.value_residual"),
        (["mechanisms.value_residual.start_layer=3"], "start_layer: 3, but model.num_layers=3 has layers 0 … 2; lower"),
        (["mechanisms.stem.layers=[1]"], "stem: its token ids take the way of mechanisms.value_residual; keep one"),
        (
            ["megatron.fused_single_qkv_rope=true", "megatron.apply_rope_fusion=true"],
            "fused_single_qkv_rope: true hides the values from mechanisms.value_residual",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(None, [*SMALL, "mechanisms.value_residual={}", *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
