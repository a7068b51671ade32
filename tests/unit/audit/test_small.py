"""The model that is audited is the configured one but for its sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sparsecod_megatron.audit.rows import plan_rows
from sparsecod_megatron.audit.small import small_run
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SIZES = {
    "preset",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "sliding_window",
    "num_moe_experts",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
}
"""Fields of `model` that may differ; every other one is a variant or a mechanism."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_sizes_differ(path: Path) -> None:
    large = load_config(path, mechanisms=MECHANISMS)
    small = small_run(large, capability=None).config
    ours, theirs = dataclasses.asdict(small.model), dataclasses.asdict(large.model)
    assert {name for name in ours if ours[name] != theirs[name]} <= SIZES
    assert [name for name in SIZES - {"preset"} if (ours[name] or 0) == 0 < (theirs[name] or 0)] == []
    assert (small.megatron, small.precision.dtype) == (large.megatron, large.precision.dtype)


def test_every_kind_of_layout_is_there() -> None:
    """Each parallel dimension alone and with data parallelism, each mechanism in each of two processes."""
    for name, kinds in (("dense_1B", {"tp2", "cp2"}), ("moe_1B_7B", {"ep2", "ep2 cp2", "ep2 tp2+sp etp1"})):
        plan = plan_rows(small_run(load_config(CONFIGS[0].with_name(f"{name}.yaml")), capability=None).config, nproc=4)
        of_two = {row.layout.name for row in plan.rows if row.layout.nproc == 2}
        assert of_two >= kinds | {"dp2", "tp2+sp", "pp2", "pp2 vpp2"}
        mechanisms = {"overlap", "recompute", "micro-batch", "resume", "validation", "overlap bf16", "resume bf16"}
        assert {f"{layout} {each}" for layout in of_two for each in mechanisms} <= {row.name for row in plan.rows}
        references = [row.against for row in plan.rows]
        names = [row.name for row in plan.rows]
        assert all(reference in names[:index] for index, reference in enumerate(references) if reference is not None)


def test_heads_groups_and_positions_keep_their_kind() -> None:
    """One query group stays one, full attention stays full, wide heads stay wide, a window stays a part."""
    kept = (
        ("model.num_query_groups=1", "num_query_groups", 1),
        ("model.num_query_groups=16", "num_query_groups", 4),
        ("model.num_query_groups=4", "num_query_groups", 2),
        ("model.kv_channels=256", "kv_channels", 48),
        ("model.sliding_window=512", "sliding_window", 8),
    )
    large = ("model.hidden_size=1024", "model.num_attention_heads=16", "data.seq_length=2048")
    for override, name, expected in kept:
        small = small_run(load_config(None, [*large, override]), capability=None).config.model
        assert getattr(small, name) == expected, override


def test_what_a_device_lacks_is_said() -> None:
    fp8 = load_config(ROOT / "examples/configs/dense_1B_fp8.yaml")
    on_cpu, on_hopper = (small_run(fp8, capability=capability) for capability in (None, (9, 0)))
    assert not on_cpu.config.precision.fp8
    assert "precision.fp8_recipe=blockwise" in on_cpu.notes[0]
    assert on_hopper.config.precision.fp8_recipe == "blockwise"
    assert {row.precision for row in plan_rows(on_hopper.config, nproc=1).rows} == {"fp32", "fp8"}


def test_megatron_fields_stay_where_they_mean_something() -> None:
    """Those of the architecture; not those that rows choose, nor those that the device lacks; each where it is read."""
    fields = (
        "megatron.rotary_interleaved=true",
        "megatron.bucket_size=1000000",
        "megatron.recompute_granularity=selective",
        "megatron.moe_token_dispatcher_type=flex",
        "megatron.moe_flex_dispatcher_backend=deepep",
        "megatron.attention_backend=flash",
    )
    large = load_config(ROOT / "examples/configs/moe_1B_7B.yaml", fields)
    on_cpu, on_cuda = (small_run(large, capability=capability) for capability in (None, (9, 0)))
    said = " ".join(on_cpu.notes)
    assert all(f"megatron.{name} is left out" in said for name in ("bucket_size", "recompute_granularity"))
    assert "megatron.attention_backend is left out: it needs Transformer Engine" in said
    megatron = {row.name: row.config(on_cuda.config).megatron for row in plan_rows(on_cuda.config, nproc=2).rows}
    assert megatron["1 process"] == {"rotary_interleaved": True, "attention_backend": "flash"}
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    assert megatron["ep2"] == megatron["1 process"] | flex


def test_layouts_that_a_model_has_not_are_named() -> None:
    documents = load_config(ROOT / "examples/configs/nano_sliding_window_documents.yaml")
    plan = plan_rows(small_run(documents, capability=None).config, nproc=2)
    assert "data.reset_attention_mask" in plan.left_out["cp2"]
    assert not any(row.layout.name == "cp2" for row in plan.rows)


def test_rows_by_name_bring_what_they_are_compared_with() -> None:
    small = small_run(load_config(ROOT / "examples/configs/nano_dense.yaml"), capability=None).config
    names = [row.name for row in plan_rows(small, nproc=2, only=["dp2 res*"]).rows]
    assert names == ["1 process", "dp2", "dp2 overlap", "dp2 resume"]
    with pytest.raises(ConfigError, match="no row has this name"):
        plan_rows(small, nproc=2, only=["dp3*"])
