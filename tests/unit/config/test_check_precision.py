"""FP8 settings that cannot train are refused in one line, whatever the machine that reads them."""

from __future__ import annotations

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS

TENSORWISE = "precision.fp8_recipe=tensorwise"
KEPT = "precision.num_layers_at_start_in_bf16"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
MOE = ["model.num_moe_experts=4", "model.moe_ffn_hidden_size=64"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_accepted(recipe: str) -> None:
    config = load_config(None, [f"precision.fp8_recipe={recipe}"], mechanisms=MECHANISMS)
    assert config.precision.fp8 and config.precision.dtype == "bf16"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([f"{KEPT}=1"], [KEPT, "fp8_recipe=none"]),
        (["precision.fp8_param_gather=true"], ["fp8_param_gather: set", "fp8_recipe=none"]),
        (["megatron.fp8=hybrid"], ["megatron.fp8: 'hybrid'", "precision.fp8_recipe"]),
        ([TENSORWISE, "megatron.fp8_recipe=delayed"], ["megatron.fp8_recipe: 'delayed'", "precision.fp8_recipe"]),
        ([TENSORWISE, "precision.dtype=fp32"], ["precision.dtype: fp32", "bf16"]),
        (["precision.fp8_recipe=delayed", f"{KEPT}=1"], [KEPT, "delayed", "tensorwise"]),
        ([TENSORWISE, f"{KEPT}=12"], [KEPT, "12 of 12 layers"]),
        (
            [TENSORWISE, "precision.num_layers_at_end_in_bf16=7", "parallel.pipeline_model_parallel_size=2"],
            ["num_layers_at_end_in_bf16: 7", "6 layers of a pipeline stage"],
        ),
        (["precision.fp8_recipe=mxfp8", "precision.fp8_param_gather=true"], ["fp8_param_gather: true", "mxfp8"]),
        ([TENSORWISE, "precision.fp8_param_gather=true", "optimizer.optimizer=muon"], ["fp8_param_gather", "Muon"]),
        ([TENSORWISE, "model.hidden_size=760", "model.kv_channels=64"], ["model.hidden_size: 760", "multiple of 16"]),
        ([TENSORWISE, "model.ffn_hidden_size=2040"], ["model.ffn_hidden_size: 2040", "multiple of 16"]),
        ([TENSORWISE, "model.ffn_hidden_size=2064", *TP2], ["model.ffn_hidden_size: 2064", "size=2 is 1032"]),
        (["precision.fp8_recipe=mxfp8", "model.ffn_hidden_size=2064"], ["2064", "multiple of 32"]),
        ([TENSORWISE, "model.kv_channels=6"], ["num_attention_heads × head channels: 72"]),
        (
            [TENSORWISE, "model.kv_channels=20", "model.num_query_groups=1"],
            ["num_query_groups: query, key and value channels: 280"],
        ),
        ([TENSORWISE, "mechanisms.headwise_gate={}"], ["each with a gate: 12", "multiple of 16"]),
        ([TENSORWISE, *MOE, "model.moe_ffn_hidden_size=72"], ["moe_ffn_hidden_size: 72"]),
        (
            [TENSORWISE, *MOE, *TP2, "model.moe_ffn_hidden_size=48"],
            ["moe_ffn_hidden_size: 48", "expert_tensor_parallel_size=2 is 24"],
        ),
        (
            [TENSORWISE, *MOE, "model.moe_shared_expert_intermediate_size=40"],
            ["moe_shared_expert_intermediate_size: 40"],
        ),
        ([TENSORWISE, "data.seq_length=1020"], ["seq_length × train.micro_batch_size: 1020"]),
    ],
)
def test_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, mechanisms=MECHANISMS)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_dense_width_does_not_matter_where_every_layer_has_experts() -> None:
    odd = [TENSORWISE, *MOE, "model.ffn_hidden_size=2040"]
    assert load_config(None, odd, mechanisms=MECHANISMS).model.ffn_hidden_size == 2040
    with pytest.raises(ConfigError, match="model.ffn_hidden_size: 2040"):
        load_config(None, [*odd, "model.moe_first_k_dense_layers=1"], mechanisms=MECHANISMS)
