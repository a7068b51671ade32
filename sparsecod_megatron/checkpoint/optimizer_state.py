"""The optimizer's part of a checkpoint: fp32 weights and moments, each under its parameter's name in the whole model.

Parameter groups belong to the layout (experts are an optimizer of their own once they are spread over ranks), so they
are those of the run that loads; their one value that matters is the step count. Megatron-Core gives the tensors in two
forms: the distributed optimizer gathers its slices, the others (Muon's) hold whole shards and annotate their state.
"""

from __future__ import annotations

import itertools
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sparsecod_megatron.checkpoint.bucket_padding import places_without_padding

_MASTERS = "fp32_from_fp16_params"


def optimizer_tensors(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, *, metadata: dict[str, Any], is_loading: bool
) -> dict[int, Any]:
    """Sharded tensors of each optimizer of the chain. Collective over all processes.

    Args:
        optimizer: optimizer of the models that `model_state` describes.
        model_state: their sharded state, which tells the place of each parameter.
        metadata: how the distributed optimizer writes.
        is_loading: whether the tensors are to be filled.
    """
    return {
        index: _sharded_slices(part, model_state, metadata, is_loading)
        if isinstance(part, DistributedOptimizer)
        else whole_shards(part, model_state)
        for index, part in enumerate(optimizer_parts(optimizer))
    }


def set_optimizer_tensors(optimizer: MegatronOptimizer, tensors: dict[int, Any], optimizer_steps: int) -> None:
    """Put loaded tensors where `optimizer_tensors` took them from. Local.

    Args:
        optimizer: optimizer of the same parameters.
        tensors: by optimizer of the chain.
        optimizer_steps: steps that these tensors have seen.
    """
    for index, part in enumerate(optimizer_parts(optimizer)):
        whole = part.state_dict()
        inner = whole.get("optimizer", whole)
        for group in inner["param_groups"]:
            group["step"] = optimizer_steps
        # An optimizer without parameters on this rank (experts on a stage of dense layers) has no tensors.
        loaded = tensors.get(index, {})
        if isinstance(part, DistributedOptimizer):
            whole["param_state"] = loaded
            whole["param_state_sharding_type"] = "fully_reshardable"
        else:
            inner["state"] = loaded.get("state", {})
            if _MASTERS in whole:
                masters = iter(loaded.get(_MASTERS, {}).values())
                whole[_MASTERS] = [list(itertools.islice(masters, len(group))) for group in whole[_MASTERS]]
        part.load_state_dict(whole)


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain. Local."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _sharded_slices(
    part: DistributedOptimizer, model_state: ShardedStateDict, metadata: dict[str, Any], is_loading: bool
) -> Any:
    if not is_loading and not part.optimizer.state:
        _start_moments(part)
    with places_without_padding(part):
        return part.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)["param_state"]


def _start_moments(part: DistributedOptimizer) -> None:
    """Create the moments that the first step would create, as it would: zero."""
    part.load_state_dict(part.state_dict())  # allocates them, not more
    for state in part.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def whole_shards(part: MegatronOptimizer, model_state: ShardedStateDict) -> dict[str, Any]:
    """Sharded tensors of an optimizer that every data-parallel rank steps whole: its own memory, no copy. Local."""
    # As if loading, also to save: what the first step would create then exists, and a checkpoint of step 0 has it.
    whole = part.sharded_state_dict(model_state, is_loading=True)
    inner = whole.get("optimizer", whole)
    masters = dict(enumerate(itertools.chain.from_iterable(whole.get(_MASTERS, []))))
    return {"state": inner["state"], _MASTERS: masters}
