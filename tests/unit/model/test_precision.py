"""The precision section as Megatron-Core's own classes understand it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend

select_backend()
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.fp8_utils import is_first_last_bf16_layer  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from sparsecod_megatron.config import PrecisionConfig  # noqa: E402
from sparsecod_megatron.model.precision import (  # noqa: E402
    ddp_precision_fields,
    optimizer_precision_fields,
    precision_fields,
)


def megatron(precision: PrecisionConfig, **fields: Any) -> TransformerConfig:
    shape = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4}
    return TransformerConfig(**shape, **precision_fields(precision), **fields)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_without_fp8(dtype: str, expected: torch.dtype) -> None:
    precision = PrecisionConfig(dtype=dtype)
    config = megatron(precision)
    assert (config.bf16, config.params_dtype, config.fp8) == (dtype == "bf16", expected, None)
    optimizer = OptimizerConfig(**optimizer_precision_fields(precision))
    assert (optimizer.bf16, optimizer.params_dtype, optimizer.fp8_recipe) == (dtype == "bf16", expected, None)
    assert not DistributedDataParallelConfig(**ddp_precision_fields(precision)).fp8_param_gather


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_recipe(recipe: str, fp8_format: str) -> None:
    precision = PrecisionConfig(
        fp8_recipe=recipe, fp8_format=fp8_format, fp8_amax_history_len=16, fp8_amax_compute_algo="most_recent"
    )
    config = megatron(precision)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (fp8_format, recipe, False)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "most_recent")
    assert not config.first_last_layers_bf16
    assert optimizer_precision_fields(precision)["fp8_recipe"] == recipe


def test_parameters_in_fp8_are_told_to_all_three_classes() -> None:
    precision = PrecisionConfig(fp8_recipe="blockwise", fp8_param_gather=True)
    assert megatron(precision).fp8_param
    assert DistributedDataParallelConfig(**ddp_precision_fields(precision)).fp8_param_gather
    optimizer = OptimizerConfig(**optimizer_precision_fields(precision), use_distributed_optimizer=True)
    assert optimizer.fp8_recipe == "blockwise"


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_layers_kept_in_bf16(first: int, last: int) -> None:
    """By Megatron's own test, which its layers apply."""
    precision = PrecisionConfig(
        fp8_recipe="tensorwise", num_layers_at_start_in_bf16=first, num_layers_at_end_in_bf16=last
    )
    config = megatron(precision)
    kept = [layer for layer in range(6) if is_first_last_bf16_layer(config, layer)]
    assert kept == [*range(first), *range(6 - last, 6)]


def test_experts_pad_themselves() -> None:
    """Padding in the router would be counted as routed tokens."""
    assert "moe_router_padding_for_quantization" not in precision_fields(PrecisionConfig(fp8_recipe="tensorwise"))


def test_every_field_exists() -> None:
    precision = PrecisionConfig(fp8_recipe="tensorwise")
    for fields, target in (
        (precision_fields(precision), TransformerConfig),
        (optimizer_precision_fields(precision), OptimizerConfig),
        (ddp_precision_fields(precision), DistributedDataParallelConfig),
    ):
        assert set(fields) <= {item.name for item in dataclasses.fields(target)}
