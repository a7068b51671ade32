"""Precision settings that cannot train, or would not do what they say, whatever the GPU.

What depends on the GPU is refused where the backend is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.config.schema import PrecisionConfig, RunConfig


def precision_problems(config: RunConfig) -> Iterator[str]:
    """One line for each problem of the precision section with the model, the layout and the optimizer."""
    precision = config.precision
    kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    if not precision.fp8:
        if kept or precision.fp8_param_gather:
            key = "fp8_param_gather" if precision.fp8_param_gather else "num_layers_at_start_in_bf16"
            yield f"precision.{key}: set, but precision.fp8_recipe=none; choose a recipe or remove it"
        return
    if precision.dtype != "bf16":
        yield f"precision.dtype: {precision.dtype}, but FP8 training keeps its other tensors in bf16; set it to bf16"
    yield from _kept_layer_problems(config, kept)
    yield from _parameter_problems(config.precision, config.optimizer.optimizer)
    yield from _size_problems(config)


def _kept_layer_problems(config: RunConfig, kept: int) -> Iterator[str]:
    precision, layers = config.precision, config.model.num_layers
    key = "precision.num_layers_at_start_in_bf16"
    if kept and precision.fp8_recipe == "delayed":
        why = "delayed scaling reduces its maxima over all layers at once"
        yield f"{key}: {kept} layers at the ends in bf16, but {why}; use fp8_recipe=tensorwise or blockwise"
    if kept >= layers:
        yield f"{key}: with those at the end {kept} of {layers} layers, which leaves none in FP8; lower it"
    stages = config.parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(precision, name)
        if count > layers // stages:
            where = f"the {layers // stages} layers of a pipeline stage"
            yield f"precision.{name}: {count} is more than {where}; lower it"


def _parameter_problems(precision: PrecisionConfig, optimizer: str) -> Iterator[str]:
    if not precision.fp8_param_gather:
        return
    if precision.fp8_recipe == "mxfp8":
        why = "mxfp8 keeps two copies of a weight, which are gathered through the gradients' buffer"
        yield f"precision.fp8_param_gather: true, but {why}, and this training step does not; set it to false"
    if optimizer == "muon":
        why = "Muon updates whole bf16 matrices"
        yield f"precision.fp8_param_gather: true, but {why}; set it to false or optimizer.optimizer to adam"


def _size_problems(config: RunConfig) -> Iterator[str]:
    """Sizes of one rank's matrix products that Transformer Engine cannot quantise."""
    recipe = config.precision.fp8_recipe
    multiple = 32 if recipe == "mxfp8" else 16
    for key, size, by_key, by in _product_sizes(config):
        if size // by % multiple:
            over = f" over {by_key}={by} is {size // by}, which" if by > 1 else ""
            yield f"{key}: {size}{over} is not a multiple of {multiple} (precision.fp8_recipe={recipe}); change it"


def _product_sizes(config: RunConfig) -> Iterator[tuple[str, int, str, int]]:
    """(key, size, key that divides it, by what) of every dimension of the layers' matrix products."""
    parallel = config.parallel
    tp_key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    etp_key, etp = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_size
    yield "model.hidden_size", config.model.hidden_size, tp_key, 1
    table = ParameterTable.of(config)
    kinds = {kind.name: kind for layer in range(config.model.num_layers) for kind in table.layer(layer) if kind.fp8}
    sizes = [(kind, kind.shape[kind.dimension or 0] // kind.stacked) for kind in kinds.values()]
    for kind, size in sorted(sizes, key=lambda item: item[1]):  # heads before the sum of heads
        shared = (etp_key, etp) if kind.split == "expert" else (tp_key, tp)
        yield kind.channels, size, shared[0], 1 if kind.dimension is None else shared[1]
    if config.model.multi_latent_attention:  # what rotates stands beside it in the product that makes it
        yield "model.kv_lora_rank", config.model.kv_lora_rank, tp_key, 1
    tokens = config.train.micro_batch_size * config.data.seq_length
    yield (
        "data.seq_length × train.micro_batch_size",
        tokens,
        "parallel.context_parallel_size",
        (parallel.context_parallel_size),
    )
