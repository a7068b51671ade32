"""Variance, RMS and ratios against definitions computed elsewhere: numpy, and transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.hf import export_model
from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.variance import VarianceGroup, variance_sums
from tests.helpers.megatron import SMALL, megatron_model, run_forward

CPU = torch.device("cpu")


@given(
    tokens=st.integers(1, 20),
    channels=st.integers(2, 70),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-3, 3),
)
def test_sums_equal_numpy(tokens: int, channels: int, scale: float, offset: float) -> None:
    x = scale * (torch.randn(tokens, channels) + offset)
    variance, squares = variance_sums(x)
    exact = x.double().numpy()
    # Rounding is relative to the mean square, which a mean away from zero makes larger than the variance.
    rounding = 1e-6 * (exact**2).sum() / (channels - 1)
    np.testing.assert_allclose(variance, exact.var(axis=1, ddof=1).sum(), rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(squares, (exact**2).sum(), rtol=1e-5)


def test_bf16_is_summed_in_fp32() -> None:
    x = torch.randn(64, 256).bfloat16()
    variance, squares = variance_sums(x)
    assert variance.dtype == squares.dtype == torch.float32
    np.testing.assert_allclose(variance, x.double().var(dim=1).sum(), rtol=1e-5)


def collect(model: torch.nn.Module, *batches: torch.Tensor) -> list[dict[str, float]]:
    """Statistics of one step over these micro-batches."""
    group = VarianceGroup([model])
    sums = LayerAccumulator(num_layers=3, names=group.names, device=CPU)
    with group.collecting(sums):
        for tokens in batches:
            run_forward(model, tokens)
    return [group.statistics(means) for means in sums.reduce()]


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], rtol: float) -> None:
    assert [sorted(layer) for layer in ours] == [sorted(layer) for layer in theirs]
    for got, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=rtol, err_msg=name)


def test_equals_transformers_hidden_states(tmp_path: Path) -> None:
    """The exported model's own hidden states and branch outputs give the same eight numbers for every layer."""
    from transformers import AutoModelForCausalLM

    from sparsecod_megatron.config import load_config

    tokens = torch.randint(0, 64, (4, 16))
    with megatron_model() as model:
        ours = collect(model, tokens)
        config = load_config(None, SMALL)
        export_model(
            config.model,
            dict(model.named_parameters()),
            tmp_path / "hf",
            seq_length=16,
            dtype=torch.float32,
            tokenizer_dir=None,
        )
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    seen: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    for index, layer in enumerate(llama.model.layers):
        record = seen[index]
        layer.register_forward_pre_hook(lambda module, args, r=record: r.update(attn_in=args[0]))
        layer.register_forward_hook(lambda module, args, out, r=record: r.update(out=out))
        layer.self_attn.register_forward_hook(lambda module, args, out, r=record: r.update(attn=out[0]))
        layer.mlp.register_forward_hook(lambda module, args, out, r=record: r.update(mlp=out))
    with torch.no_grad():
        llama(tokens)

    def variance(x: torch.Tensor) -> float:
        return float(x.double().var(dim=-1).mean())

    theirs = []
    for record in seen:
        mlp_in = record["attn_in"] + record["attn"]
        layer = {f"{name}_var": variance(record[name]) for name in ("out", "attn", "mlp")}
        layer |= {f"{name}_rms": float(record[name].double().square().mean().sqrt()) for name in ("out", "attn", "mlp")}
        layer["attn_ratio"] = layer["attn_var"] / variance(record["attn_in"])
        layer["mlp_ratio"] = layer["mlp_var"] / variance(mlp_in)
        theirs.append(layer)
    assert_close(ours, theirs, rtol=1e-5)


def test_both_ratios_of_a_parallel_layer_are_of_its_input() -> None:
    tokens = torch.randint(0, 64, (4, 16))
    seen: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    with megatron_model("model.norm_placement=parallel", "model.qkv_bias=true", "model.mlp_bias=true") as model:
        for record, layer in zip(seen, model.decoder.layers, strict=True):
            layer.input_layernorm.register_forward_pre_hook(lambda module, args, r=record: r.update(x=args[0]))
            layer.register_forward_hook(lambda module, args, out, r=record: r.update(out=out[0]))
            for name, branch in (("attn", layer.self_attention), ("mlp", layer.mlp)):
                branch.register_forward_hook(
                    lambda module, args, out, r=record, n=name: r.update({n: out[0] if out[1] is None else sum(out)})
                )
        ours = collect(model, tokens)
    for layer, record in zip(ours, seen, strict=True):
        torch.testing.assert_close(record["out"], record["x"] + record["attn"] + record["mlp"])
        variances = {name: float(value.double().var(dim=-1).mean()) for name, value in record.items()}
        for name in ("attn", "mlp"):
            np.testing.assert_allclose(layer[f"{name}_ratio"], variances[name] / variances["x"], rtol=1e-5)


def test_micro_batches_add_up() -> None:
    """Uneven micro-batches give what one batch gives: every token weighs the same."""
    tokens = torch.randint(0, 64, (5, 16))
    with megatron_model() as model:
        assert_close(collect(model, tokens[:1], tokens[1:3], tokens[3:]), collect(model, tokens), rtol=1e-6)


@pytest.mark.parametrize(
    "recompute",
    [
        ("megatron.recompute_granularity=full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"),
        ("megatron.recompute_granularity=full", "megatron.recompute_method=block", "megatron.recompute_num_layers=2"),
        ("megatron.recompute_granularity=selective",),
        ("megatron.recompute_granularity=selective", "megatron.recompute_modules=[layernorm,mlp]"),
    ],
    ids=["full-uniform", "full-block", "selective-attention", "selective-layernorm-mlp"],
)
def test_a_recomputed_forward_counts_once(recompute: tuple[str, ...]) -> None:
    tokens = torch.randint(0, 64, (2, 16))

    def with_backward(*overrides: str) -> list[dict[str, float]]:
        torch.manual_seed(0)
        with megatron_model("megatron.gradient_accumulation_fusion=false", *overrides) as model:
            group = VarianceGroup([model])
            sums = LayerAccumulator(num_layers=3, names=group.names, device=CPU)
            with group.collecting(sums):
                run_forward(model, tokens).square().mean().backward()
            assert int(sums._sums[0, 0, 1]) == tokens.numel()
            return [group.statistics(means) for means in sums.reduce()]

    assert_close(with_backward(*recompute), with_backward(), rtol=1e-6)


def test_hooks_leave_nothing_behind() -> None:
    with megatron_model() as model:
        before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        collect(model, torch.randint(0, 64, (1, 16)))
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
