"""Which modules stand where: fused with Transformer Engine exactly where a fused norm computes the same."""

from __future__ import annotations

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL
from tests.helpers.variants import MOE_SHAPE

select_backend()

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402

from sparsecod_megatron.model import transformer_config  # noqa: E402
from sparsecod_megatron.model.layer import VariedLayer  # noqa: E402
from sparsecod_megatron.model.norms import NORMS, RMSNorm  # noqa: E402
from sparsecod_megatron.model.residual import (  # noqa: E402
    BranchNorm,
    LayerInput,
    ParallelEnd,
    ParallelStart,
    PostNorm,
)
from sparsecod_megatron.model.specs import block_spec, layer_spec  # noqa: E402
from sparsecod_megatron.seams.mechanism import LayerSite, configured  # noqa: E402

ENGINE = TESpecProvider()
LINEAR = {"fused": ENGINE.column_parallel_layer_norm_linear(), "plain": ENGINE.column_parallel_linear()}


def spec(*overrides: str, layer: int = 0) -> ModuleSpec:
    """A layer of Transformer Engine's modules; nothing is built, so no GPU is needed."""
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    megatron = transformer_config(config, transformer_engine=True)
    return layer_spec(LayerSite(config.model, megatron, ENGINE, layer), configured(config))


@pytest.mark.parametrize(
    ("overrides", "qkv", "fc1", "join"),
    [
        ((), "fused", "fused", None),
        (("model.norm_placement=peri",), "fused", "fused", BranchNorm),
        (("model.norm_placement=peri", "model.layernorm_scaling=true"), "fused", "fused", BranchNorm),
        (("model.norm_placement=post",), "plain", "plain", PostNorm),
        (("model.layernorm_scaling=true",), "plain", "plain", None),
        (("mechanisms.headwise_gate={}",), "plain", "fused", None),
        (("model.attention_output_gate=elementwise",), "fused", "fused", None),
    ],
)
def test_fusion(overrides: tuple[str, ...], qkv: str, fc1: str, join: type | None) -> None:
    places = spec(*overrides).submodules
    assert places.self_attention.submodules.linear_qkv is LINEAR[qkv]
    assert places.mlp.submodules.linear_fc1 is LINEAR[fc1]
    assert (places.input_layernorm is IdentityOp) == (qkv == "fused" or join is PostNorm)
    assert (places.pre_mlp_layernorm is IdentityOp) == (fc1 == "fused" or join is PostNorm)
    for bda in (places.self_attn_bda, places.mlp_bda):
        assert (bda.module if isinstance(bda, ModuleSpec) else None) is join


def test_layernorm_scaling_falls_with_depth() -> None:
    for layer in (0, 2):
        norm = spec("model.layernorm_scaling=true", layer=layer).submodules.input_layernorm
        assert norm.module is RMSNorm
        assert norm.params["scale"] == pytest.approx((layer + 1) ** -0.5)


@pytest.mark.parametrize("kind", NORMS)
def test_the_second_branch_of_a_parallel_layer_reads_its_input(kind: str) -> None:
    """Fused or not; of experts the norm is a module of its own."""
    parallel = ("model.norm_placement=parallel", f"model.normalization={kind}")
    for overrides, fused in ((parallel, True), ((*parallel, "model.layernorm_scaling=true"), False)):
        places = spec(*overrides).submodules
        assert (places.self_attn_bda.module, places.mlp_bda.module) == (ParallelStart, ParallelEnd)
        assert places.mlp.submodules.linear_fc1 is LINEAR["fused" if fused else "plain"]
        second = places.pre_mlp_layernorm
        assert second is LayerInput if fused else (second.module, second.params["read"]) == (NORMS[kind], LayerInput)
    second = spec(*parallel, *MOE_SHAPE).submodules.pre_mlp_layernorm
    assert (second.module, second.params) == (NORMS[kind], {"scale": 1.0, "read": LayerInput})


def test_experts_keep_their_norm_outside() -> None:
    places = spec(*MOE_SHAPE).submodules
    assert places.self_attention.submodules.linear_qkv is LINEAR["fused"]
    assert places.pre_mlp_layernorm is ENGINE.layer_norm(rms_norm=True)
    assert "pre_mlp_layernorm." not in places.sharded_state_dict_keys_map


def test_only_layers_that_differ_carry_changes() -> None:
    depth = (*MOE_SHAPE, "model.moe_router_topk_per_layer=[1,2,4]", "model.moe_router_pre_softmax=true")
    changes = [spec(*depth, layer=layer) for layer in range(3)]
    assert [item.module is VariedLayer for item in changes] == [True, False, True]
    assert [item.params.get("changes") for item in changes] == [{"moe_router_topk": 1}, None, {"moe_router_topk": 4}]


def test_the_final_norm_can_be_left_out() -> None:
    for final_norm in (True, False):
        overrides = ["model.norm_placement=post", f"model.final_norm={str(final_norm).lower()}"]
        config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
        megatron = transformer_config(config, transformer_engine=False)
        block = block_spec(config, megatron, ENGINE, vp_stage=None, pp_rank=0)
        assert (block.layer_norm is not None) == final_norm
