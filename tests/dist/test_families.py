"""Models of open families, written by transformers, imported and trained on: under every layout as in one process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.cli import import_
from tests.dist.families_worker import CASES, FAMILIES, Case, train
from tests.helpers.cli import script_ranks
from tests.unit.hf import deepseek
from tests.unit.hf.test_source import (
    EXPERTS,
    FACTORS,
    GEMMA3,
    GLM,
    GPT_OSS,
    NEOX,
    PARTIAL,
    SIZES,
    TOKENS,
    UNCAPPED,
    save,
)

pytestmark = pytest.mark.dist
DEPTH = {"num_hidden_layers": 4, "vocab_size": 64}
SHAPE = SIZES | DEPTH
WINDOWED = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=2, **TOKENS),
    "phi3": Phi3Config(**SHAPE, sliding_window=5, rope_parameters=PARTIAL, **TOKENS),
    "granite": GraniteConfig(**SHAPE, **FACTORS, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SHAPE),
    "olmo3": Olmo3Config(**SHAPE, sliding_window=5, layer_types=WINDOWED),
    "gemma": GemmaConfig(**SHAPE, **TOKENS),
    "gemma2": Gemma2Config(**SHAPE, **UNCAPPED, sliding_window=5, **TOKENS),
    "gemma3": Gemma3TextConfig(**SHAPE, **GEMMA3),
    "gpt-oss": GptOssConfig(**SHAPE, **GPT_OSS),
    "neox": GPTNeoXConfig(**NEOX | DEPTH),
    "neox-sequential": GPTNeoXConfig(**NEOX | DEPTH, use_parallel_residual=False, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]),
    "glm4-moe": Glm4MoeConfig(**SHAPE, **GLM),
    "deepseek-v3": DeepseekV3Config(**deepseek.V3 | DEPTH, rope_parameters=deepseek.YARN),
    "deepseek-v2": DeepseekV2Config(**deepseek.V2 | DEPTH | {"q_lora_rank": None}),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported, each compared with transformers' reading."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        directory = save(CONFIGS[name], folder / "hf" / name)
        import_.run(argparse.Namespace(hf=directory, output=folder / name, config=None, verify=True))
    return folder


@pytest.fixture(scope="module")
def spread(runs: Path, repo_root: Path) -> dict[str, Any]:
    """All cases on two processes."""
    output = runs / "runs.json"
    script_ranks(repo_root / "tests/dist/families_worker.py", runs, output, nproc=2)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def single(runs: Path) -> dict[str, Any]:
    """Each family in this process."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    cases = [Case(family, "") for family in FAMILIES]
    config = cases[0].config(runs)
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        return {case.model: train(case, runs, backend, groups) for case in cases}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_goes_on_as_in_one_process(case: Case, spread: dict[str, Any], single: dict[str, Any]) -> None:
    """Losses and gradient norms to 1e-5; the second step has seen the gradients."""
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(spread[case.name][name], single[case.model][name], rtol=1e-5, err_msg=name)
