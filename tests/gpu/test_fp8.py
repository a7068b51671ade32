"""FP8 trains what bf16 trains: losses and layer variances of every recipe after 20 steps."""

from __future__ import annotations

import functools

import pytest
import torch

from sparsecod_megatron.backend.cuda import versions
from sparsecod_megatron.backend.precision_support import check_precision
from sparsecod_megatron.config import PrecisionConfig
from sparsecod_megatron.errors import ConfigError
from tests.gpu.runs import SHAPE, Training, assert_alike, needs_engine, train
from tests.helpers.training import small_trainer

pytestmark = [pytest.mark.gpu, needs_engine]
STEPS = 20
BF16 = "precision.dtype=bf16"
MOE = ("model.num_moe_experts=4", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=256")
KEPT = ("precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=1")
GATHER = ("precision.fp8_param_gather=true",)


@functools.cache
def reference(*model: str) -> Training:
    """The run in bf16."""
    run = train(*model, BF16, steps=STEPS)
    assert run.losses[-1] < run.losses[0], "there is something to learn"
    return run


def skip_unless_supported(recipe: str) -> None:
    capability, cuda_version = versions(torch.device("cuda", torch.cuda.current_device()))
    try:
        check_precision(PrecisionConfig(fp8_recipe=recipe), capability=capability, cuda_version=cuda_version)
    except ConfigError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize(
    ("recipe", "fp8_format", "options"),
    [
        ("delayed", "hybrid", ()),
        ("tensorwise", "hybrid", ()),
        ("blockwise", "e4m3", ()),
        ("mxfp8", "e4m3", ()),
        ("tensorwise", "hybrid", KEPT),
        ("blockwise", "e4m3", KEPT),
        ("delayed", "hybrid", GATHER),
        ("tensorwise", "hybrid", GATHER),
        ("blockwise", "e4m3", GATHER),
        ("blockwise", "e4m3", (*KEPT, *GATHER)),
        ("delayed", "hybrid", MOE),
        ("tensorwise", "hybrid", MOE),
        ("blockwise", "e4m3", MOE),
    ],
)
def test_trains_as_bf16(recipe: str, fp8_format: str, options: tuple[str, ...]) -> None:
    skip_unless_supported(recipe)
    precision = (f"precision.fp8_recipe={recipe}", f"precision.fp8_format={fp8_format}")
    model = [option for option in options if option.startswith("model.")]
    run, expected = train(BF16, *precision, *options, steps=STEPS), reference(*model)
    assert run.losses != expected.losses, "FP8 rounds, so equal losses mean that it was not in use"
    assert_alike(run, expected, loss=0.02, variance=0.05)


def test_layers_at_the_ends_keep_bf16_weights() -> None:
    """With weights held in FP8 one sees which layers do: all but the first and the last."""
    skip_unless_supported("tensorwise")
    with small_trainer(*SHAPE, BF16, "precision.fp8_recipe=tensorwise", *KEPT, *GATHER) as trainer:
        from megatron.core.fp8_utils import is_float8tensor

        from sparsecod_megatron.model import unwrap

        layers = unwrap(trainer.models[0]).decoder.layers
        assert [is_float8tensor(layer.mlp.linear_fc2.weight) for layer in layers] == [False, True, True, False]
