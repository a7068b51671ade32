"""What Megatron-Core takes from NVIDIA's packages, or uses as if they were there, written in torch.

For both backends: the CPU never has Transformer Engine and apex, a CUDA machine may not, and Emerging-Optimizers is on
no package index. Where a package is there, nothing stands in for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from sparsecod_megatron.backend import adamw
from sparsecod_megatron.backend.redirection import Redirection


class NoFP8:
    """Stands for Transformer Engine's FP8 state, which activation recompute asks unconditionally."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never without Transformer Engine."""
        return False


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def l2_norm(
    chunk_size: int, no_op: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, [1] in fp32; Megatron-Core's own waits for the device once a tensor.

    Source: amp_C.multi_tensor_l2norm (arguments).
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors[0]))).float().reshape(1), None


class WholeLinear(torch.nn.Linear):
    """A linear layer that every tensor-parallel rank holds whole: Transformer Engine's that is called `duplicated`.

    Args:
        input_size: channels of the input.
        output_size: channels of the output.
        config: Megatron-Core's.
        init_method: fills the weight.
        bias: never.
        **options: of Megatron-Core's linear layers, which say nothing of a layer that is not split.

    Source: Megatron-Core 0.16.1 extensions/transformer_engine.py, `TELinear` (arguments, marks on the weight).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        **options: Any,
    ) -> None:
        assert not bias and options.get("parallel_mode", "duplicated") == "duplicated", options
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        init_method(self.weight)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        # Ranks of a sharded sequence see other tokens, so that their gradients are summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """[..., input_size] → [..., output_size], and no bias."""
        return super().forward(input), None


def redirections() -> list[Redirection]:
    """Redirections of what this process lacks, whatever its device."""
    from_muon: list[Redirection] = []
    if importlib.util.find_spec("megatron.core.optimizer.muon"):  # upstream moves it about; AdamW must not care
        from sparsecod_megatron.backend import orthogonalized

        from_muon = orthogonalized.redirections()
    return [*_names_of_the_engine(), *_norm(), *adamw.redirections(), *from_muon]


def _norm() -> list[Redirection]:
    if clip_grads.l2_norm_impl is not getattr(clip_grads, "local_multi_tensor_l2_norm", None):
        return []
    reason = "one copy to the host for each gradient"
    return [Redirection(clip_grads, "l2_norm_impl", l2_norm, "optimizer/clip_grads.py:107", reason, speed_only=True)]


def _names_of_the_engine() -> list[Redirection]:
    """Names that Megatron-Core has with Transformer Engine only, and uses without asking whether it is there."""
    if megatron_random.HAVE_TE:
        return []
    table: list[tuple[Any, str, Any, str]] = [
        (moe_utils, "te_general_gemm", None, "transformer/moe/moe_utils.py:1192"),
        (multi_latent_attention, "TELinear", WholeLinear, "transformer/multi_latent_attention.py:181"),
        (megatron_random, "FP8GlobalStateManager", NoFP8, "tensor_parallel/random.py:589"),
        (megatron_random, "activation_recompute_forward", _no_context, "tensor_parallel/random.py:592"),
        (megatron_random, "fp8_autocast", _no_context, "tensor_parallel/random.py:687"),
    ]
    return [Redirection(*row, reason="no Transformer Engine in this process", absent=True) for row in table]
