"""Every YAML in examples/ is a run that Megatron-Core accepts, of the size its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsecod_megatron.config import ModelConfig, data_parallel_size, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


def parameters(model: ModelConfig, *, active: bool = False) -> int:
    """Parameters by hand: matrices of attention, MLP or experts, router, norms, embeddings."""
    hidden, heads, groups, width = (model.hidden_size, model.num_attention_heads, model.query_groups, model.head_dim)
    attention = hidden * width * (2 * heads + 2 * groups)
    if model.num_moe_experts:
        experts = model.moe_router_topk if active else model.num_moe_experts
        mlp = 3 * hidden * (experts * model.expert_ffn_hidden_size + (model.moe_shared_expert_intermediate_size or 0))
        mlp += hidden * model.num_moe_experts
    else:
        mlp = 3 * hidden * model.ffn_hidden_size
    vocabulary = (model.vocab_size or 0) * hidden
    return model.num_layers * (attention + mlp + 2 * hidden) + hidden + 2 * vocabulary


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds(path: Path) -> None:
    """Parses, checks, fits the processes that its header names, and becomes a TransformerConfig."""
    from sparsecod_megatron.backend import select_backend

    backend = select_backend()
    from sparsecod_megatron.model import transformer_config

    config = load_config(path)
    processes = re.search(r"--nproc (\d+)|(\d+) GPUs", path.read_text())
    assert processes, "the header says on how many processes it runs"
    world = int(processes.group(1) or processes.group(2))
    assert data_parallel_size(config, world) >= 1
    megatron = transformer_config(config, transformer_engine=backend.transformer_engine)
    assert megatron.num_layers == config.model.num_layers


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("dense_1B", 1_279_854_592, None),
        ("dense_400M", 645_318_144, None),
        ("moe_400M_2B", 1_983_996_672, 398_549_760),
        ("moe_1B_7B", 6_919_096_320, 1_281_951_744),
        ("moe_1B_13B_ref", 13_361_547_264, 2_087_258_112),
        ("moe_ablation", 7_982_644_320, 1_238_989_920),
    ],
)
def test_paper_models_have_their_sizes(name: str, total: int, active: int | None) -> None:
    model = load_config(ROOT / "examples" / "configs" / f"{name}.yaml").model
    assert parameters(model) == total
    if active is not None:
        assert parameters(model, active=True) == active
