"""SliceGPT: the residual stream is rotated so that its last coordinates hold little, and those are cut off.

Q are the eigenvectors of Σ x·xᵀ over the streams x before every norm, the largest first, and n the weights of a norm.
What reads the stream behind that norm becomes W·diag(n)·Q, what writes to it Qᵀ·W, embeddings E·Q; d' of the d columns
of Q stay. Norm weights √(d/d') and ε·d/d' undo that a mean of squares is now one over d'. So the small model computes
exactly what the large one does with its streams projected onto the kept directions, and is refused where the two do not
agree. Norms of queries and keys share ε: their layers are scaled by √(d/d'), which leaves their outputs as they were.

One rotation serves the whole model, so residual additions need no matrices and the class stays a stock one. With
`rotation=place`, the paper's way, each norm has a Q of its own, of Σ x·xᵀ before it alone, all of the dense model; an
addition between places of Q and R then takes x·QᵀR (`shortcuts.py`), and the directory is of our own class. The paper's
code takes Σ x·xᵀ of a model that is sliced up to there, and subtracts the mean of every embedding, which is wrong for
models with RMSNorm.

Source: arXiv 2401.15024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.calibration import feeder
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.narrowing import adopt, class_shapes, kept_width
from sparsecod_megatron.compression.shortcuts import NORMS, Shortcut, attach, bridge
from sparsecod_megatron.config.fields import at_least, from_to_below
from sparsecod_megatron.errors import CheckpointError, ConversionError
from sparsecod_megatron.hf.blocks import Layers, find_layers, trial_tokens

READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "g_proj", "gate_proj", "up_proj", "gate_up_proj")
ROUTERS = ("gate", "shared_expert_gate")
WRITERS = ("o_proj", "down_proj")
INSIDE = ("q_norm", "k_norm", "expert_bias")
"""What sees no residual stream."""
AGREEMENT = 1e-3
"""Relative difference of logits that rounding in fp32 may leave."""


@dataclass
class SliceGPTSettings:
    """How narrow the residual stream becomes."""

    share: float = from_to_below(0.0, 1.0, 0.25)
    """Share of its coordinates to cut off."""
    multiple: int = at_least(1, 8)
    """The width becomes the nearest multiple of this and of the number of heads, which transformers asks of Llama."""
    rotation: str = field(default="model", metadata={"choices": ("model", "place")})
    """One rotation for the whole model; `place`, one for each norm, with matrices between them."""


@dataclass(frozen=True)
class Part:
    """A parameter, and what the rotation does to it.

    Attributes:
        name: in the model.
        reads: whether its last axis is the residual stream's.
        writes: whether its last axis but one is, or its only one.
        norm: name of the norm's weights that it takes up, or of its own where it is a norm's; empty without.
        place: name of the weights of the norm before which the stream is in the basis that it reads or writes in.
        is_normed: whether a norm of queries or keys follows.
    """

    name: str
    reads: bool = False
    writes: bool = False
    norm: str = ""
    place: str = ""
    is_normed: bool = False


class SliceGPT(Method):
    """See the module."""

    name = "slicegpt"
    needs = Needs(calibration=True)
    Settings = SliceGPTSettings

    def compress(self, material: Material) -> Outcome:
        """Rotate and cut the whole model. Collective."""
        model, layers = material.model, find_layers(material.model)
        places = _places(model, layers)
        parts = _parts(model, layers, places)
        norms = {name: model.get_submodule(name.removesuffix(".weight")) for name in places}
        width = layers.hidden_size
        multiple = math.lcm(self.settings.multiple, model.config.num_attention_heads)
        kept = kept_width(width, self.settings.share, multiple)
        if self.settings.share and kept == width:
            raise ConversionError(
                f"--method slicegpt: share={self.settings.share} with multiple={self.settings.multiple} cuts none of "
                f"{width} coordinates; raise share or lower multiple"
            )
        fields = _fields(model, width, kept)
        class_shapes(model, fields)  # what the configuration refuses should not wait for the calibration
        bases = _bases(material, norms, width, kept, apart=self.settings.rotation == "place")
        wanted = _projected_logits(model, layers, bases)
        _untie(model, layers)
        weights = {name: norm.get_parameter("weight").double().clone() for name, norm in norms.items()}
        for part in parts:
            new = _sliced(part, model.get_parameter(part.name).detach().double(), bases, weights, width / kept)
            material.changes.put(part.name, new)
        adopt(model, fields)
        outcome = self._connect(model, layers, bases)
        _require_close(model, _logits(model), wanted)
        return outcome

    def _connect(self, model: PreTrainedModel, layers: Layers, bases: dict[str, Tensor]) -> Outcome:
        """Put the changes of basis into the model, where there are any."""
        if self.settings.rotation == "model":
            return Outcome()
        order = list(bases.values())
        for (block, branch), (before, after) in zip(_branches(layers), pairwise(order), strict=True):
            change = before.T @ after
            change.diagonal().sub_(1)
            shortcut = Shortcut(len(change))
            shortcut.weight = nn.Parameter(change.to(model.dtype), requires_grad=False)
            attach(block, branch, shortcut)
        warning = (
            "each norm sees the stream in a basis of its own, so depth scores that compare depths mean nothing here"
        )
        return Outcome(structure={"blocks": layers.name, "width": order[0].shape[1]}, warnings=[warning])

    @classmethod
    def build(cls, model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
        """Attach shortcuts to the blocks of `structure["blocks"]`."""
        try:
            for block in model.get_submodule(structure["blocks"]).children():
                for branch in NORMS:
                    attach(block, branch, Shortcut(structure["width"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"config.json: blocks that do not fit {type(model).__name__}: {error}") from error


def _branches(layers: Layers) -> list[tuple[nn.Module, str]]:
    """Each block with the names of its branches, in the order in which the stream comes by."""
    return [(block, branch) for block in layers.blocks for branch in NORMS]


def _parts(model: PreTrainedModel, layers: Layers, places: list[str]) -> list[Part]:
    """What becomes of every parameter.

    Args:
        model: to be sliced.
        layers: of it.
        places: as `_places` names them.

    Raises:
        ConversionError: naming the first that has no place in a pre-norm model with RMSNorm.
    """
    if getattr(layers.final_norm, "weight", None) is None:
        raise ConversionError(f"--method slicegpt: {type(model).__name__} has no final norm; use another method")
    names = {id(module): name for name, module in model.named_modules()}
    after, final = dict(pairwise(places)), places[-1]
    outside: dict[str, dict[str, Any]] = {
        f"{names[id(layers.embed)]}.weight": {"reads": True, "place": places[0]},
        final: {"norm": final, "place": final},
        f"{names[id(layers.head)]}.weight": {"reads": True, "norm": final, "place": final},
    }
    parts = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        told = outside.get(name)
        if told is None and name.startswith(f"{layers.name}."):
            layer, _, leaf = name.removeprefix(f"{layers.name}.").partition(".")
            told = _in_block(model.get_submodule(f"{layers.name}.{layer}"), f"{layers.name}.{layer}", leaf, after)
        if told is None:
            raise ConversionError(
                f"{name}: --method slicegpt does not know what this does to the residual stream; it takes pre-norm "
                "models with RMSNorm and the names of Llama and Qwen, so use another method"
            )
        parts.append(Part(name, **told))
    return parts


def _places(model: PreTrainedModel, layers: Layers) -> list[str]:
    """Names of the weights of the norms, in the order in which the stream comes by."""
    names = {id(module): name for name, module in model.named_modules()}
    inside = [f"{layers.name}.{layer}.{norm}.weight" for layer in range(len(layers)) for norm in NORMS.values()]
    return [*inside, f"{names.get(id(layers.final_norm), '')}.weight"]


def _in_block(block: nn.Module, prefix: str, name: str, after: dict[str, str]) -> dict[str, Any] | None:
    """A parameter of a block, or None where it is of no known kind; `after` has the norm that follows each."""
    branch, *path = name.split(".")
    if name.removesuffix(".weight") in NORMS.values():
        return {"norm": f"{prefix}.{name}", "place": f"{prefix}.{name}"}
    if branch not in NORMS:
        return None
    before = f"{prefix}.{NORMS[branch]}.weight"
    is_bias, leaf = path[-1] == "bias", path[-2] if path[-1] in ("weight", "bias") else path[-1]
    if leaf in READERS or leaf in ROUTERS:
        head_norm = (
            getattr(block.get_submodule(branch), f"{leaf[0]}_norm", None) if leaf in ("q_proj", "k_proj") else None
        )
        is_normed = head_norm is not None and any(True for _ in head_norm.parameters())
        return {"reads": not is_bias, "norm": "" if is_bias else before, "place": before, "is_normed": is_normed}
    if leaf in WRITERS:
        return {"writes": True, "place": after[before]}
    return {} if leaf in INSIDE else None


def _fields(model: PreTrainedModel, width: int, kept: int) -> dict[str, Any]:
    """What the configuration will say."""
    config: Any = model.config
    if config.get_text_config() is not config or not hasattr(config, "rms_norm_eps"):
        raise ConversionError(
            f"--method slicegpt: {type(config).__name__} has no rms_norm_eps of its own; use another method"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    epsilon = config.rms_norm_eps * width / kept
    return {"hidden_size": kept, "head_dim": head_dim, "rms_norm_eps": epsilon, "tie_word_embeddings": False}


def _bases(material: Material, norms: dict[str, nn.Module], width: int, kept: int, *, apart: bool) -> dict[str, Tensor]:
    """Q of each norm's place, float64 `[d, d']`, in the norms' order. Collective.

    A few channels of trained models are thousands of times the others, whose directions float32 sums would lose.

    Args:
        material: the model and its calibration sequences.
        norms: by the names of their weights.
        width: d.
        kept: d'.
        apart: whether each has a Q of its own, of Σ x·xᵀ over what enters it; otherwise one tensor is that of all.
    """
    keys = list(norms) if apart else ["all"] * len(norms)
    device = material.model.device
    grams = {key: torch.zeros(width, width, dtype=torch.float64, device=device) for key in dict.fromkeys(keys)}

    def see(gram: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        gram.addmm_(rows.T, rows)

    hooks = [
        norm.register_forward_pre_hook(partial(see, grams[key])) for key, norm in zip(keys, norms.values(), strict=True)
    ]
    try:
        feeder(material.part(), material.batch_size)(material.model)
    finally:
        for hook in hooks:
            hook.remove()
    found = {
        key: torch.linalg.eigh(material.processes.total(gram)).eigenvectors.flip(1)[:, :kept]
        for key, gram in grams.items()
    }
    return {name: found[key] for name, key in zip(norms, keys, strict=True)}


def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=trial_tokens(model), use_cache=False).logits
    return logits.double()


def _projected_logits(model: PreTrainedModel, layers: Layers, bases: dict[str, Tensor]) -> Tensor:
    """What the model says of a few tokens where its stream is projected onto the kept directions of each place."""
    projectors = {basis: (basis @ basis.T).float() for basis in set(bases.values())}  # one, where all share a basis
    first, *others = bases.values()

    def project(basis: Tensor, hidden: Tensor) -> Tensor:
        return (hidden.float() @ projectors[basis]).to(hidden.dtype)

    def join(basis: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return project(basis, x + output) - x

    hooks = [layers.embed.register_forward_hook(lambda _module, _args, output: project(first, output))]
    for (block, branch), basis in zip(_branches(layers), others, strict=True):
        hooks += bridge(block, branch, partial(join, basis))
    try:
        return _logits(model)
    finally:
        for hook in hooks:
            hook.remove()


def _untie(model: PreTrainedModel, layers: Layers) -> None:
    """Give the head weights of its own, which take up the final norm's."""
    head: Any = layers.head
    embed: Any = layers.embed
    if head.weight is embed.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _sliced(part: Part, weight: Tensor, bases: dict[str, Tensor], norms: dict[str, Tensor], ratio: float) -> Tensor:
    """New values of a parameter, float64.

    Args:
        part: what it is.
        weight: float64.
        bases: Q of each place, float64 `[d, d']`.
        norms: weights of the norms before the change.
        ratio: d / d'.
    """
    if part.reads:
        weight = (weight * norms[part.norm] if part.norm else weight) @ bases[part.place]
    elif part.norm:
        return torch.full_like(weight[: bases[part.place].shape[1]], ratio**0.5)
    elif part.writes:
        basis = bases[part.place]
        weight = weight @ basis if weight.ndim == 1 else basis.T @ weight
    return weight * ratio**0.5 if part.is_normed else weight


def _require_close(model: PreTrainedModel, found: Tensor, wanted: Tensor) -> None:
    """Refuse a model of which the rotation changed more than the projection does."""
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= max(AGREEMENT, 16 * torch.finfo(model.dtype).eps):
        raise ConversionError(
            f"--method slicegpt: {type(model).__name__} cut to the kept directions gives other logits than with its "
            f"streams projected onto them (relative difference {difference:.2g}): it is not a plain pre-norm model "
            "with RMSNorm; use another method"
        )
