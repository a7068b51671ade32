"""Combinations that cannot run are refused before anything starts, naming key, value and fix."""

from __future__ import annotations

import pytest

from sparsecod_megatron.config import data_parallel_size, load_config
from sparsecod_megatron.errors import ConfigError

MOE = ["model.num_moe_experts=4", "model.moe_ffn_hidden_size=64"]
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hidden_size=100"], ["model.hidden_size: 100", "num_attention_heads=12"]),
        (["model.num_query_groups=5"], ["model.num_attention_heads: 12", "num_query_groups=5"]),
        (["model.kv_channels=3"], ["model.kv_channels: 3", "even"]),
        (["parallel.tensor_model_parallel_size=5"], ["num_attention_heads: 12", "tensor_model_parallel_size=5"]),
        (["model.num_query_groups=3", TP2], ["model.num_query_groups: 3", "tensor_model_parallel_size=2"]),
        (["model.ffn_hidden_size=2049", TP2], ["model.ffn_hidden_size: 2049"]),
        (["model.vocab_size=1001", TP2], ["model.vocab_size: 1001"]),
        (["model.num_layers=11", PP2], ["model.num_layers: 11", "pipeline_model_parallel_size=2"]),
        (["parallel.virtual_pipeline_model_parallel_size=2"], ["virtual_pipeline_model_parallel_size: 2", "least 2"]),
        ([PP2, "parallel.virtual_pipeline_model_parallel_size=5"], ["model.num_layers: 12"]),
        (["parallel.sequence_parallel=true"], ["sequence_parallel: true"]),
        (["data.seq_length=1023", TP2, "parallel.sequence_parallel=true"], ["data.seq_length: 1023"]),
        (["data.seq_length=1022", "parallel.context_parallel_size=2"], ["data.seq_length: 1022"]),
        (["parallel.expert_model_parallel_size=2"], ["expert_model_parallel_size: 2", "num_moe_experts"]),
        ([*MOE, "parallel.expert_model_parallel_size=3"], ["model.num_moe_experts: 4"]),
        ([*MOE, "model.moe_router_topk=5"], ["moe_router_topk: 5", "num_moe_experts=4"]),
        ([*MOE, "model.moe_router_topk=1"], ["moe_router_pre_softmax=true"]),
        ([*MOE, TP2], ["sequence_parallel: false"]),
        ([*MOE, "model.moe_ffn_hidden_size=63", TP2, "parallel.sequence_parallel=true"], ["moe_ffn_hidden_size: 63"]),
        (
            [*MOE, TP2, "parallel.sequence_parallel=true", "model.mlp_bias=true"],
            ["expert_tensor_parallel_size: 2", "model.mlp_bias", "set it to 1"],
        ),
        (
            ["parallel.context_parallel_size=4", "model.num_query_groups=2", "model.softmax_type=learnable"],
            ["parallel.context_parallel_size: 4", "2 key heads", "softmax_type=learnable"],
        ),
        (
            [*MOE, TP2, "parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=1"],
            ["expert_tensor_parallel_size: 1", "never sums"],
        ),
        (["schedule.lr_warmup_steps=1000"], ["lr_warmup_steps: 1000", "lr_decay_steps=1000"]),
        (["train.exit_step=2000"], ["train.exit_step: 2000"]),
        (["checkpoint.save_steps=[5,2000]"], ["checkpoint.save_steps: [5, 2000]", "from 1 to train.train_steps=1000"]),
        (["checkpoint.save_steps=[5,5]"], ["checkpoint.save_steps: [5, 5]", "each once"]),
        (["data.train=x"], ["data.tokenizer: not set"]),
    ],
)
def test_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world", "size"),
    [([], 1, 1), ([], 8, 8), ([TP2], 8, 4), ([TP2, PP2], 8, 2), (["parallel.context_parallel_size=2"], 8, 4)],
)
def test_data_parallel_size(overrides: list[str], world: int, size: int) -> None:
    assert data_parallel_size(load_config(None, overrides), world) == size


@pytest.mark.parametrize(
    ("overrides", "world", "part"),
    [
        ([TP2], 3, "does not divide 3 processes"),
        ([*MOE, "parallel.expert_model_parallel_size=4"], 2, "expert_model_parallel_size"),
        (["train.global_batch_size=6", "train.micro_batch_size=2"], 2, "global_batch_size: 6"),
        (
            [PP2, "parallel.virtual_pipeline_model_parallel_size=2", "train.global_batch_size=3"],
            2,
            "gives 3 micro-batches",
        ),
    ],
)
def test_refused_for_this_number_of_processes(overrides: list[str], world: int, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        data_parallel_size(load_config(None, overrides), world)


def test_a_vocabulary_that_can_be_shared_is_whatever_it_is_a_multiple_of() -> None:
    """SmolLM2's 49,152 over three processes; of one that is not known yet, only the tokenizer will tell."""
    three = ["parallel.tensor_model_parallel_size=3", "model.make_vocab_size_divisible_by=128"]
    shape = ["model.num_query_groups=3", "model.ffn_hidden_size=1536", "precision.dtype=fp32"]
    assert load_config(None, [*three, *shape, "model.vocab_size=49152"]).model.vocab_size == 49152
    assert load_config(None, [*three, *shape]).model.vocab_size is None
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 50305 is not divisible"):
        load_config(None, [*three, "model.num_query_groups=3", "model.ffn_hidden_size=1536", "model.vocab_size=50305"])
