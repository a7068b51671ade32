"""Configurations of every family that nobody wrote down: read exactly, or refused in one line. Logits are the judge.

Each draw is written by transformers itself, in one file or several, with and without a generation_config.json.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sparsecod_megatron.cli.import_ import run_config
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf import export_model
from sparsecod_megatron.hf.families import FAMILIES, choose_family
from sparsecod_megatron.hf.source import SafetensorsFiles, open_source
from tests.helpers.reference_gpt import forward
from tests.unit.hf.test_source import save

DRAWS = 12
"""Of each family."""
SHARD = "20KB"
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
}
WINDOW = st.sampled_from([None, 3, 9])
WINDOWS = {"use_sliding_window": st.booleans(), "sliding_window": WINDOW, "max_window_layers": st.integers(0, 3)}
BIASES = {"attention_bias": st.booleans(), "mlp_bias": st.booleans()}
EXPERTS: dict[str, st.SearchStrategy[Any]] = {
    "num_experts": st.sampled_from([2, 4]),
    "num_experts_per_tok": st.sampled_from([2, 2, 2, 3, 1]),
    "moe_intermediate_size": st.sampled_from([8, 20]),
    "norm_topk_prob": st.booleans(),
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
BY_KIND = [
    {"full_attention": {"rope_type": "default", "rope_theta": 5000.0, **rope}, "sliding_attention": local}
    for rope in ({}, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0})
    for local in (LOCAL, LOCAL | {"rope_type": "linear", "factor": 2.0})
]
GEMMA: dict[str, st.SearchStrategy[Any]] = {
    "attention_bias": st.booleans(),
    "query_pre_attn_scalar": st.sampled_from([4, 7]),
    "sliding_window": st.sampled_from([3, 9]),
    "rope_parameters": st.sampled_from(BY_KIND).map(copy.deepcopy),
}
SPARSE = {"mlp_only_layers": st.sampled_from([[], [0], [0, 1], [1]]), "decoder_sparse_step": st.sampled_from([1, 1, 2])}
RARELY_TRUE = [False] * 7 + [True]
LATENT: dict[str, st.SearchStrategy[Any]] = {
    "num_key_value_heads": st.none(),
    "scales": st.sampled_from([None, {"mscale": 0.7, "mscale_all_dim": 1.5}, {"mscale_all_dim": 1.0}]),
    "q_lora_rank": st.sampled_from([None, 8, 12]),
    "kv_lora_rank": st.sampled_from([8, 16]),
    "qk_nope_head_dim": st.sampled_from([4, 8]),
    "qk_rope_head_dim": st.sampled_from([4, 6]),
    "v_head_dim": st.sampled_from([4, 8, 14]),
    "attention_bias": st.sampled_from(RARELY_TRUE),
    "n_routed_experts": st.sampled_from([4, 8]),
    "num_experts_per_tok": st.sampled_from([2, 2, 2, 3, 1]),
    "moe_intermediate_size": EXPERTS["moe_intermediate_size"],
    "n_shared_experts": st.integers(1, 2),
    "first_k_dense_replace": st.integers(0, 3),
    "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
}
OWN_FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": BIASES,
    "mistral": {"sliding_window": WINDOW},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | {"attention_bias": st.booleans()},
    "smollm3": WINDOWS | BIASES | {"no_rope_layer_interval": st.integers(1, 4)},
    "phi3": {"sliding_window": WINDOW, "partial": st.sampled_from([0.5, 1.0])},
    "granite": BIASES
    | {
        "embedding_multiplier": st.sampled_from([1.0, 12.0]),
        "residual_multiplier": st.sampled_from([1.0, 0.22]),
        "attention_multiplier": st.sampled_from([1.0, 0.1]),
        "logits_scaling": st.sampled_from([1.0, 8.0]),
    },
    "olmo2": {"attention_bias": st.booleans()},
    "gpt_neox": {
        "attention_bias": st.booleans(),
        "use_parallel_residual": st.booleans(),
        "hidden_act": st.sampled_from(["gelu", "gelu_new", "relu", "silu"]),
        "layer_norm_eps": st.sampled_from([1e-6, 1e-3]),
        "partial": st.sampled_from([0.5, 1.0]),
    },
    "olmo3": {"attention_bias": st.booleans(), "sliding_window": st.sampled_from([3, 9])},
    "gemma": {"attention_bias": st.booleans()},
    "gemma2": {name: strategy for name, strategy in GEMMA.items() if name != "rope_parameters"}
    | {"attn_logit_softcapping": st.sampled_from([None, None, 50.0]), "final_logit_softcapping": st.none()},
    "gemma3_text": GEMMA | {"sliding_window_pattern": st.integers(1, 3)},
    "gpt_oss": {
        "num_local_experts": EXPERTS["num_experts"],
        "num_experts_per_tok": EXPERTS["num_experts_per_tok"],
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([3, 9]),
        "swiglu_limit": st.sampled_from([0.5, 7.0]),
        "swiglu_alpha": st.sampled_from([1.702, 1.702, 1.5]),
    },
    "olmoe": {"attention_bias": st.booleans(), "clip_qkv": st.sampled_from([None, None, 2.0])}
    | {name: EXPERTS[name] for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob")},
    "mixtral": {
        "sliding_window": WINDOW,
        "num_local_experts": EXPERTS["num_experts"],
        "num_experts_per_tok": EXPERTS["num_experts_per_tok"],
    },
    "qwen2_moe": EXPERTS
    | SPARSE
    | {"shared_expert_intermediate_size": st.sampled_from([8, 24]), "qkv_bias": st.sampled_from([True, True, False])},
    "qwen3_moe": EXPERTS | SPARSE | {"attention_bias": st.booleans(), "sliding_window": WINDOW},
    "deepseek_v3": LATENT
    | {
        "n_group": st.sampled_from([1, 1, 2]),
        "topk_group": st.just(1),
        "norm_topk_prob": st.sampled_from(RARELY_TRUE).map(operator.not_),
        "rope_interleave": st.sampled_from(RARELY_TRUE).map(operator.not_),
        "num_mtp_layers": st.just(0),
    },
    "deepseek_v2": LATENT
    | {
        "topk_method": st.sampled_from(["greedy", "greedy", "group_limited_greedy"]),
        "n_group": st.sampled_from([1, 2]),
        "topk_group": st.just(1),
        "mlp_bias": st.sampled_from(RARELY_TRUE),
    },
    "glm4_moe": {
        "n_routed_experts": st.sampled_from([4, 8]),
        "num_experts_per_tok": st.sampled_from([2, 4]),
        "moe_intermediate_size": EXPERTS["moe_intermediate_size"],
        "n_shared_experts": st.integers(1, 2),
        "n_group": st.sampled_from([1, 1, 2]),
        "topk_group": st.integers(1, 2),
        "first_k_dense_replace": st.integers(0, 2),
        "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
        "norm_topk_prob": st.sampled_from([True, True, False]),
        "use_qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "num_mtp_layers": st.just(0),
        "partial": st.sampled_from([0.5, 1.0]),
    },
}
"""model_type → fields beyond those of all families; `partial` is the share of channels that rotate, `scales` YaRN's."""
LACKED = {
    "gpt_neox": ("num_key_value_heads", "head_dim", "rms_norm_eps"),
    "deepseek_v2": ("head_dim",),
    "deepseek_v3": ("head_dim",),
}
"""Fields of others that a family has not, or that follow from its own."""
CLASSES = {family.config_class.model_type: family.config_class for family in FAMILIES if not family.extensible}


@st.composite
def configurations(draw: st.DrawFn, kind: str) -> PreTrainedConfig:
    """Heads that share or not and fill the width or not, tied or not, any rotation, and what is the family's own."""
    own = {name: draw(strategy) for name, strategy in OWN_FIELDS[kind].items()}
    groups, head_dim, rope = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([4, 6, 8])),
        draw(st.sampled_from(list(ROPES))),
    )
    heads = groups * draw(st.integers(1, 2))
    rotation = {"rope_type": rope, "rope_theta": draw(st.sampled_from([100.0, 10000.0])), **ROPES[rope]}
    if (share := own.pop("partial", 1.0)) < 1 or kind == "gpt_neox":  # which has another default
        rotation["partial_rotary_factor"] = share
    if (scales := own.pop("scales", None)) and rope == "yarn":
        rotation |= scales
    fields = {
        "vocab_size": draw(st.integers(33, 70)),
        "hidden_size": heads * head_dim if draw(st.booleans()) and not heads * head_dim % 4 else 24,  # rows of 16 bytes
        "intermediate_size": draw(st.sampled_from([8, 20, 36])),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": draw(st.sampled_from([32, 64])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rotation,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    fields |= {"head_dim": head_dim} if draw(st.booleans()) else {}
    fields = {name: value for name, value in fields.items() if name not in LACKED.get(kind, ())}
    try:
        return CLASSES[kind](**fields | own)
    except (StrictDataclassError, KeyError):  # no configuration of transformers' either
        assume(False)
        raise


def test_every_family_is_drawn() -> None:
    """A new one gets a line above."""
    assert OWN_FIELDS.keys() == CLASSES.keys()


@pytest.mark.parametrize("kind", OWN_FIELDS)
def test_read_exactly_or_refused(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is read has transformers' logits and gives its tensors back; both things happen."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=DRAWS, derandomize=True)
    @given(config=configurations(kind), sharded=st.booleans(), generates=st.booleans())
    def judge(config: PreTrainedConfig, sharded: bool, generates: bool) -> None:
        outcome = read_or_refused(config, tmp_path_factory.mktemp(kind), sharded=sharded, generates=generates)
        outcomes[outcome] += 1

    judge()
    assert outcomes["read"] >= DRAWS // 6


def read_or_refused(config: PreTrainedConfig, folder: Path, *, sharded: bool, generates: bool) -> str:
    """Which of both; fails where neither is right."""
    tokens = torch.randint(0, config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))
    try:
        theirs = save(config, folder / "theirs", **({"max_shard_size": SHARD} if sharded else {}))
        expected = logits(theirs, tokens)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # nor can transformers compute it
        event(str(error).splitlines()[0])
        assume(False)
    if not generates:
        (theirs / "generation_config.json").unlink()
    try:
        source = open_source(theirs)
        model = run_config(source, None).model
        tensors = dict(source.tensors())
    except (ConfigError, ConversionError) as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    # Drawn scales make scores sharp, and where a token nearly scores two alike, rounding decides which it attends to.
    near = {"rtol": 1e-5, "atol": 2e-5 * max(3.0, float(expected.abs().max())) + 8 * rounding(theirs, tokens, expected)}
    with torch.no_grad():
        torch.testing.assert_close(forward(model, tensors, tokens)[0], expected, **near)
    ours = export_model(
        model, tensors, folder / "ours", seq_length=source.seq_length, dtype=torch.float32, tokenizer_dir=None
    )
    # A simpler class may say the same, so tensors are compared where it is the class that was read.
    torch.testing.assert_close(logits(ours, tokens), expected, **near)
    before, after = (SafetensorsFiles(path) for path in (theirs, ours))
    if choose_family(model) is source.family:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    return "read"


def logits(directory: Path, tokens: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """As transformers computes them, `[batch, seq, vocabulary]`, with weights off by a share of themselves."""
    model, generator = AutoModelForCausalLM.from_pretrained(directory).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
        computed: torch.Tensor = model(tokens).logits
    return computed


def rounding(directory: Path, tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits go when every weight is off by one rounding of fp32."""
    moved = logits(directory, tokens, noise=torch.finfo(torch.float32).eps)
    return float((moved - expected).abs().max())


@pytest.mark.parametrize("kind", OWN_FIELDS)
def test_pickled_weights_are_refused(kind: str, tmp_path: Path) -> None:
    """They are programs; the message says what is needed."""
    without_more = {"num_mtp_layers": 0}
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = CLASSES[kind](**{"glm4_moe": without_more, "deepseek_v3": without_more, "gemma2": uncapped}.get(kind, {}))
    config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConversionError, match="safetensors") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
