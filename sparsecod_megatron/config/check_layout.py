"""Layouts that cannot run, or would train wrong, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.fields import indivisible
from sparsecod_megatron.config.megatron_fields import STAGE_FIELDS
from sparsecod_megatron.config.model_schema import ModelConfig
from sparsecod_megatron.config.schema import ParallelConfig, RunConfig


def layout_problems(config: RunConfig) -> Iterator[str]:
    """One line for each problem of the parallel section with the model and the data."""
    model, parallel = config.model, config.parallel
    tp_key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    yield from indivisible("model.num_attention_heads", model.num_attention_heads, tp_key, tp)
    if model.query_groups >= tp or tp % model.query_groups:
        yield from indivisible("model.num_query_groups", model.query_groups, tp_key, tp)
    yield from indivisible("model.ffn_hidden_size", model.ffn_hidden_size, tp_key, tp)
    # Not its multiple: 49,152 rows are a multiple of 128 that three processes can share. A size that is still to come
    # from the tokenizer is checked when it is known.
    if model.vocab_size is not None:
        yield from indivisible("model.vocab_size", model.vocab_size, tp_key, tp)
    yield from _sink_problems(model, parallel)
    yield from _pipeline_problems(config)
    yield from _sequence_problems(parallel, config.data.seq_length)
    yield from _expert_problems(model, parallel)


def _sink_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Transformer Engine shares heads with sinks out among context-parallel ranks, never keys."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if model.softmax_type != "vanilla" and max(1, model.query_groups // tensor) % context:
        yield (
            f"parallel.context_parallel_size: {context} ranks share the {model.query_groups} key heads over {tensor} "
            f"tensor-parallel ranks, which model.softmax_type={model.softmax_type} asks for; lower it"
        )


def _pipeline_problems(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    pp_key, stages = "parallel.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size
    vpp_key, chunks = "virtual_pipeline_model_parallel_size", parallel.virtual_pipeline_model_parallel_size
    if any(config.megatron.get(field) for field in STAGE_FIELDS):
        return
    if chunks is None:
        yield from indivisible("model.num_layers", model.num_layers, pp_key, stages)
        return
    if stages == 1:
        yield f"parallel.{vpp_key}: {chunks} needs {pp_key} of at least 2; remove it or raise that"
    yield from indivisible("model.num_layers", model.num_layers, f"{pp_key} × {vpp_key}", stages * chunks)


def _sequence_problems(parallel: ParallelConfig, length: int) -> Iterator[str]:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: true needs tensor_model_parallel_size of at least 2; set it to false"
    pieces = (2 * cp if cp > 1 else 1) * (tp if parallel.sequence_parallel else 1)
    yield from indivisible(
        "data.seq_length", length, "tensor (with sequence_parallel) × twice the context parallel size", pieces
    )


def _expert_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    ep_key, ep = "parallel.expert_model_parallel_size", parallel.expert_model_parallel_size
    if not model.is_moe:
        if ep > 1:
            yield f"{ep_key}: {ep} needs a mixture of experts; set model.num_moe_experts or {ep_key}=1"
        return
    tp_key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    etp_key, etp = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_size
    yield from indivisible("model.num_moe_experts", model.num_moe_experts or 0, ep_key, ep)
    yield from indivisible("model.moe_ffn_hidden_size", model.expert_ffn_hidden_size, etp_key, etp)
    if model.mlp_bias and etp > 1:
        adds = "each of them would add the experts' output bias (model.mlp_bias)"
        yield f"{etp_key}: {etp}, but {adds}; set it to 1, with {ep_key} above 1"
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        yield from indivisible("model.moe_shared_expert_intermediate_size", shared, tp_key, tp)
    if etp != tp and ep == 1:
        trains_wrong = "with one expert group Megatron never sums the gradients of the experts' copies"
        yield f"{etp_key}: {etp}, but {tp_key}={tp}: {trains_wrong}; set {ep_key} above 1 or remove {etp_key}"
    if tp > 1 and not parallel.sequence_parallel:
        yield f"parallel.sequence_parallel: false, but Megatron needs it for experts with {tp_key}={tp}; set it to true"
