"""Finds the weight matrices of every block and names the part of attention or feed-forward that each one is.

No per-model code: leaves are linear layers, GPT-2's Conv1D (transposed storage) or modules that hold all experts of a
layer as three-dimensional parameters. What feeds what decides between feed-forward network, attention and other mixers
of tokens (`wiring.py`); names common among model families tell queries, keys and values apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.blocks import Layers
from sparsecod_megatron.hf.expert_modules import is_fused_experts, is_projection
from sparsecod_megatron.hf.wiring import Wiring, trace_wiring

KINDS = ("q", "k", "v", "qkv", "kv", "o", "output_gate", "gate", "up", "gate_up", "down", "mixer")
"""`qkv` is also what leads into attention under no known name, `output_gate` what scales an output channel by channel,
`mixer` what leads into and out of a convolution, a state-space model or another recurrence."""
_ATTENTION_NAMES = {
    "q": ("q_proj", "query", "query_proj", "project_q", "wq", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "key_proj", "project_k", "wk"),
    "v": ("v_proj", "value", "value_proj", "project_v", "wv"),
    "kv": ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "qkv", "wqkv", "w_pack"),
    "o": ("o_proj", "out_proj", "c_proj", "dense", "wo", "attention_out"),
    "output_gate": ("output_gate", "gate_proj", "g_proj", "in_proj_z"),
}
_FEED_FORWARD_NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3", "wi"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo"),
}
_GATE_NAMES = ("gate", "router", "shared_expert_gate", "wg")
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


def find_matrices(model: PreTrainedModel, layers: Layers) -> list[Matrix]:
    """All attention, feed-forward and other mixing matrices, in order of layer and of the modules within a block.

    Args:
        model: a causal LM in evaluation mode; it runs once on a few tokens.
        layers: its blocks.

    Raises:
        ConversionError: no block holds a matrix, or the model cannot be run for it.
    """
    wirings = trace_wiring(model, layers)
    blocks = zip(layers.blocks, wirings, strict=True)
    found = [matrix for layer, (block, wiring) in enumerate(blocks) for matrix in _of_block(layer, block, wiring)]
    if not found:
        raise ConversionError(
            "no linear layer in any of the model's blocks: sparsity needs blocks of nn.Linear, Conv1D or expert weights"
        )
    return found


def unmeasured_share(blocks: Iterable[nn.Module], matrices: Sequence[Matrix]) -> float:
    """Share of the blocks' weights, which are parameters of two axes or more, that are in none of the matrices.

    Args:
        blocks: blocks of the model.
        matrices: found in them.
    """
    weights = {id(weight): weight.numel() for block in blocks for weight in block.parameters() if weight.ndim > 1}
    measured = {id(matrix.weight) for matrix in matrices}
    return sum(size for key, size in weights.items() if key not in measured) / sum(weights.values())


def _of_block(layer: int, block: nn.Module, wiring: Wiring) -> Iterator[Matrix]:
    roles = _Roles(block, wiring)
    for path, module in block.named_modules():
        if not is_projection(module) or not roles.is_called(path):
            continue
        transposed = isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
        if is_fused_experts(module):
            for attribute, kind in _EXPERT_PARAMETERS.items():
                if isinstance(getattr(module, attribute, None), nn.Parameter):
                    yield Matrix(layer, kind, f"{path}.{attribute}", module, attribute, transposed)
        elif (found := roles.kind(path, module)) is not None:
            yield Matrix(layer, found, f"{path}.weight", module, "weight", transposed)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, or of one with a matrix per expert."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    num_out, num_in = module.get_parameter("weight").shape[-2:]
    return num_in, num_out


class _Roles:
    """What each projection of one block is.

    Args:
        block: the module.
        wiring: wiring of its projections.
    """

    def __init__(self, block: nn.Module, wiring: Wiring) -> None:
        self._block = block
        self._wiring = wiring
        self._downs: dict[nn.Module, list[nn.Module]] = {}
        """Every inner projection of a feed-forward network → what it leads into."""
        for module, wire in wiring.items():
            for feeder in wire.feeders if wire.is_down else ():
                self._downs.setdefault(feeder, []).append(module)
        called = {path: module for path, module in block.named_modules() if module in wiring}
        mixers = [path for path, module in called.items() if wiring[module].is_mixer_output]
        self._mixing = self._leading_into([called[path] for path in mixers if not self._is_attention(path)])
        self._fellows: dict[str, list[nn.Module]] = {}
        for path, module in called.items():
            self._fellows.setdefault(_place(path), []).append(module)

    def is_called(self, path: str) -> bool:
        """Whether the model called the module, or another expert in its place; a weight may be used without that."""
        return _place(path) in self._fellows

    def kind(self, path: str, module: nn.Module) -> str | None:
        """One of `KINDS`; None for routers, gates of whole outputs, and anything outside these three.

        Experts of one place are alike: some got no token, or one whose activations are all zero.
        """
        fellows = self._fellows[_place(path)]
        wires = [self._wiring[fellow] for fellow in fellows]
        if path.rpartition(".")[2] in _GATE_NAMES:
            return None
        if self._is_attention(path):
            return _named(path, _ATTENTION_NAMES) or ("o" if any(wire.is_mixer_output for wire in wires) else "qkv")
        if any(wire.is_down for wire in wires):
            return "down"
        num_in, num_out = _sizes(module)
        if downs := [down for fellow in fellows for down in self._downs.get(fellow, ())]:
            if all(num_out == 2 * _sizes(down)[0] for down in downs):
                return "gate_up"
            return "gate" if _named(path, _FEED_FORWARD_NAMES) == "gate" or "gate" in path.rpartition(".")[2] else "up"
        if not self._mixing.isdisjoint(fellows):
            return "mixer"
        scales = any(wire.reads_stream and wire.writes_stream for wire in wires)
        return "output_gate" if scales and num_in == num_out else None

    def _is_attention(self, path: str) -> bool:
        """Decided by the name of a module it is in, or because queries and keys are beside it."""
        *parents, _ = path.split(".")
        if any(("attn" in part or "attention" in part) and "norm" not in part for part in map(str.lower, parents)):
            return True
        holder = self._block.get_submodule(".".join(parents))
        beside = {_named(name, _ATTENTION_NAMES) for name, _ in holder.named_children()}
        return {"q", "k"} <= beside

    def _leading_into(self, ends: Sequence[nn.Module]) -> set[nn.Module]:
        """These and whatever feeds them, directly or through others."""
        found: set[nn.Module] = set()
        waiting = list(ends)
        while waiting:
            module = waiting.pop()
            if module not in found:
                found.add(module)
                waiting.extend(self._wiring[module].feeders)
        return found


def _named(path: str, names: dict[str, tuple[str, ...]]) -> str | None:
    """The kind of a known name, which is the last of a path or, for a wrapped layer, the one before."""
    for part in reversed(path.lower().split(".")[-2:]):
        for kind, known in names.items():
            if part in known:
                return kind
    return None


def _place(path: str) -> str:
    """A path without the numbers of experts; the number of a layer itself, as in a `Sequential`, is its name."""
    *parents, leaf = path.split(".")
    return ".".join([*("*" if part.isdigit() else part for part in parents), leaf])
