"""Finds the weight matrices of every block and says which of attention and feed-forward they are.

No per-model code: leaves are linear layers, GPT-2's Conv1D (transposed storage) or a module that holds all experts of a
layer as three-dimensional parameters. A name common among model families decides the kind; an unknown name is decided
by where it stands and which side has the width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.analysis.sparsity.expert_modules import is_fused_experts
from sparsecod_megatron.errors import ConversionError

KINDS = ("q", "k", "v", "qkv", "kv", "o", "gate", "up", "gate_up", "down")
_ATTENTION_NAMES = {
    "q": ("q_proj", "query", "wq", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "kv": ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "W_pack"),
    "o": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
}
_FEED_FORWARD_NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3", "wi"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo"),
}
_GATE_NAMES = ("gate", "router", "shared_expert_gate", "wg", "g_proj")
_EXPERT_PARAMETERS = {"gate_up_proj": "gate_up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass(frozen=True)
class Matrix:
    """One weight parameter of a block.

    Attributes:
        layer: 0-based index of the block.
        kind: one of `KINDS`; fused projections keep their own kind.
        name: path below the block, as in the state dict.
        module: the module that owns the parameter.
        attribute: the parameter's name in that module.
        transposed: True where the parameter is stored `[in, out]` instead of `[out, in]`.
    """

    layer: int
    kind: str
    name: str
    module: nn.Module
    attribute: str
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The parameter: `[out, in]`, `[in, out]` where transposed, with a leading expert axis for fused experts."""
        weight: Tensor = getattr(self.module, self.attribute)
        return weight


def find_matrices(blocks: Iterable[nn.Module], hidden_size: int) -> list[Matrix]:
    """All attention and feed-forward matrices, in order of layer and of the modules within a block.

    Args:
        blocks: the model's blocks, in order.
        hidden_size: width of the residual stream.

    Raises:
        ConversionError: no block holds a matrix.
    """
    found = [matrix for layer, block in enumerate(blocks) for matrix in _of_block(layer, block, hidden_size)]
    if not found:
        raise ConversionError(
            "no linear layer in any of the model's blocks: sparsity needs blocks of nn.Linear, Conv1D or fused expert "
            "weights"
        )
    return found


def _of_block(layer: int, block: nn.Module, hidden_size: int) -> Iterator[Matrix]:
    for path, module in block.named_modules():
        if is_fused_experts(module):
            transposed = bool(getattr(module, "is_transposed", False))
            for attribute, kind in _EXPERT_PARAMETERS.items():
                if isinstance(getattr(module, attribute, None), nn.Parameter):
                    yield Matrix(layer, kind, f"{path}.{attribute}", module, attribute, transposed)
            continue
        sizes = _sizes(module)
        leaf_kind = _kind(path, *sizes, hidden_size) if sizes else None
        if leaf_kind:
            yield Matrix(layer, leaf_kind, f"{path}.weight", module, "weight", not isinstance(module, nn.Linear))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # a linear layer stored [in, out]
        return module.nx, module.nf
    return None


def _kind(path: str, num_in: int, num_out: int, hidden_size: int) -> str | None:
    """The kind of a linear layer at `path` below its block; None for routers and gates of whole outputs."""
    *parents, leaf = path.split(".")
    if leaf in _GATE_NAMES:
        return None
    if any("attn" in part.lower() or "attention" in part.lower() for part in parents):
        names, inner, outer = _ATTENTION_NAMES, "qkv", "o"
    else:
        names, inner, outer = _FEED_FORWARD_NAMES, "up", "down"
    for kind, known in names.items():
        if leaf in known:
            return kind
    if num_out == hidden_size:
        return outer
    return inner if num_in == hidden_size else None
