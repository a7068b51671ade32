"""What computes: three sets of functions with the same results up to rounding, one of which is in use.

`plain` is torch's own products and Megatron-Core's loop over experts. `fast`, the default, takes oneDNN's products
where those were measured to be faster (`backend/choice.py`), one function for all experts of a layer, and sums over a
token's experts in one pass. `compiled` is `fast` with elementwise formulas through torch.compile. docs/PERFORMANCE.md
says what each gains.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP

from sparsecod_megatron.backend import functional
from sparsecod_megatron.backend.cpu import experts, linear, permutation, speed
from sparsecod_megatron.backend.redirection import Redirection

DEFAULT = "fast"

_KERNELS_PLAIN = SimpleNamespace(  # None, if upstream drops a name: then no set replaces it
    linear=getattr(layers, "linear_with_grad_accumulation_and_async_allreduce", None),
    experts=SequentialMLP.forward,
    sort_chunks=getattr(token_dispatcher, "sort_chunks_by_idxs", None),
    permute=getattr(token_dispatcher, "permute", None),
    unpermute=getattr(token_dispatcher, "unpermute", None),
    rms_norm=functional.rms_norm,
    cross_entropy=tensor_parallel.vocab_parallel_cross_entropy,
    swiglu=speed.swiglu,
    rotary=speed.apply_rotary,
)
_KERNELS_FAST = SimpleNamespace(
    **vars(_KERNELS_PLAIN)
    | {
        "linear": linear.linear,
        "experts": experts.forward,
        "sort_chunks": experts.sort_chunks,
        "permute": permutation.permute,
        "unpermute": permutation.unpermute,
        "rms_norm": speed.rms_norm,
    }
)


def redirections(kernels: str) -> list[Redirection]:
    """Redirections that put one set in use, whichever was before.

    Args:
        kernels: `plain`, `fast` or `compiled`; without a C++ compiler the last is `fast`.
    """
    use = {"plain": lambda: _KERNELS_PLAIN, "fast": lambda: _KERNELS_FAST, "compiled": _compiled}[kernels]()
    moe = "transformer/moe"
    table: list[tuple[Any, str, Any, str, str]] = [
        (
            layers,
            "linear_with_grad_accumulation_and_async_allreduce",
            use.linear,
            "tensor_parallel/layers.py:952",
            "torch's fp32 products are slow on some processors",
        ),
        (SequentialMLP, "forward", use.experts, f"{moe}/experts.py:876", "a loop over modules"),
        (
            token_dispatcher,
            "sort_chunks_by_idxs",
            use.sort_chunks,
            f"{moe}/token_dispatcher.py:732",
            "copies for nothing",
        ),
        (token_dispatcher, "permute", use.permute, f"{moe}/token_dispatcher.py:637", "its gradient adds row by row"),
        (token_dispatcher, "unpermute", use.unpermute, f"{moe}/token_dispatcher.py:833", "adds row by row"),
        (functional, "rms_norm", use.rms_norm, "transformer/torch_norm.py:32", "torch's is not fused on CPU"),
        (
            tensor_parallel,
            "vocab_parallel_cross_entropy",
            use.cross_entropy,
            "models/common/language_module/language_module.py:167",
            "seven passes over the logits",
        ),
        (mlp, "bias_swiglu_impl", use.swiglu, "transformer/mlp.py:205", "needs a compiler"),
        (
            rope_utils,
            "fused_apply_rotary_pos_emb",
            use.rotary,
            "models/common/embeddings/rope_utils.py:280",
            "a CUDA kernel",
        ),
    ]
    # Megatron-Core's own fused rotation exists for CUDA alone.
    return [Redirection(*row, speed_only=row[0] is not rope_utils) for row in table]


def _compiled() -> SimpleNamespace:
    from sparsecod_megatron.backend.cpu import compiled

    if not compiled.has_compiler():
        return _KERNELS_FAST
    formulas = {
        "rms_norm": compiled.rms_norm,
        "cross_entropy": compiled.cross_entropy,
        "swiglu": compiled.swiglu,
        "rotary": compiled.apply_rotary,
    }
    return SimpleNamespace(**vars(_KERNELS_FAST) | formulas)
