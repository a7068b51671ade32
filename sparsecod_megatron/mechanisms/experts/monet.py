"""Monet: E² experts of product keys in place of a dense MLP, each token's chosen by two keys of E entries.

Each head h of a token gives both keys' entries a logit z = w·x, keeps those that reach a threshold, and takes the
softmax g over them; the threshold is what k of E normal numbers reach, mean + Φ⁻¹(1 − k/E) · deviation of the head's
logits, or the largest logit if that is lower. With expert (i, j) weighing Σ over heads of g1_i g2_j,

    horizontal: expert_ij(x) = V_j act(U_i x + c_i) + b_j
    vertical:   units act(U1_i x), act(U2_j x); V11_i, V12_j give the upper half of the output (+ b1_i), V21_i, V22_j
                the lower (+ b2_j)

which is computed without ever naming an expert: a head sums one key's units by its gates, and passes the sum to the
other key's entries. U and V together are the matrices of a plain MLP of the same width, m = width / E units an expert,
so every operation is dense: the gates say who was at work, they save nothing. Choose k and E for what is to be read.

Deviations from the published model. It takes mean and deviation by batch norm over the tokens at hand, so that a
token's gates depend on its neighbours and a loss on the micro-batch and the layout. Here a step uses running values,
which end a step moved by `momentum` towards those of all its tokens: exact under any layout, the same in training,
evaluation and export, and one step late. They begin at 0 and what the initial weights give a normalised token. No
gradient passes them there either. Each layer has keys of its own; the paper's shares those of four layers, whose gates
would have to travel between pipeline stages. Its two losses on the gates are left out: the public code has none, and
their formulas could not be read.

The threshold is a jump: a logit within rounding of it may fall either way in another layout or an export.

Source: Park et al., Monet: Mixture of Monosemantic Experts for Transformers (arXiv 2412.04139), and modeling_monet.py
of its repository: formulas, defaults, squared ReLU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least, between, choice
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.activations.topk_activation import TopKActivation
from sparsecod_megatron.mechanisms.experts.product_keys import (
    ExpertsOutput,
    HasKeys,
    KeyStatistics,
    ProductKeys,
    UnitsInput,
)
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored
from sparsecod_megatron.seams.mechanism import ExportedTensor, LayerSite, Mechanism, Module, RankShape, mixed
from sparsecod_megatron.seams.plugin import Plugin, StepParts

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.metrics.group import Statistics

ACTIVATIONS = ("relu", "relu2")
"""Without a gate, and not fused with a bias."""


@dataclass
class Monet(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "monet"
    shapes_weights: ClassVar[bool] = True
    unfused: ClassVar[tuple[str, ...]] = ("mlp",)
    # Layers see 8,192 logits of a token. Where rounding decides that one reaches the threshold, it takes about 1 / k of
    # its head's weights from the others: 128 tokens of three layers moved logits by 0.1 % of the largest.
    has_choices: ClassVar[bool] = True

    experts: int = at_least(2, 512)
    """Entries of each key, E; there are E² experts."""
    heads: int = at_least(1, 8)
    """Choices that a token makes."""
    k: int = at_least(1, 32)
    """Entries that a choice is to keep of each key, on average."""
    decomposition: str = choice("vertical", "horizontal")
    """Whether both keys bring units, or the first input and the second output weights."""
    momentum: float = between(0, 1, 0.1)
    """How far a step moves the running mean and variance of the logits."""

    @property
    def is_vertical(self) -> bool:
        """Whether both keys bring units."""
        return self.decomposition == "vertical"

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Layers that it is not for, sizes that do not fit, and what changes the same matrices otherwise."""
        name, model, tensor = f"mechanisms.{self.name}", config.model, config.parallel.tensor_model_parallel_size
        if model.is_moe:
            yield f"model.num_moe_experts: {model.num_moe_experts}, but {name} is for dense MLPs; remove one of them"
        if model.mlp_bias:
            yield f"model.mlp_bias: true, but experts of {name} have biases of their own; remove it"
        if model.activation not in ACTIVATIONS:
            yield f"model.activation: {model.activation}, but experts of {name} have no gate; use relu2 or relu"
        if self.k > self.experts:
            yield f"{self.key('k')}: {self.k} is more than experts={self.experts}; lower it"
        parts = self.experts * (2 if self.is_vertical else 1)
        if model.ffn_hidden_size % parts:
            what = f"{parts} = experts" + (" × 2 keys" if self.is_vertical else "")
            yield f"model.ffn_hidden_size: {model.ffn_hidden_size} is not divisible by {what} of {name}; change one"
        if self.is_vertical and model.hidden_size % 2:
            yield f"model.hidden_size: {model.hidden_size} has no halves for vertical {name}; use an even one"
        if self.experts % tensor:
            among = f"parallel.tensor_model_parallel_size={tensor}"
            yield f"{self.key('experts')}: {self.experts} is not divisible by {among}; change one of them"
        if config.precision.fp8:
            yield f"precision.fp8_recipe: {config.precision.fp8_recipe}, but {name} multiplies in bf16; remove it"
        if config.optimizer.optimizer == "muon":
            yield f"optimizer.optimizer: muon orthogonalises whole matrices, not the experts of {name}; use adam"
        if config.megatron.get("use_te_activation_func"):
            yield f"megatron.use_te_activation_func: true, but {name} has a bias before the activation; remove it"
        for other in config.mechanisms.values():
            kinds = {"mlp_input", "mlp_output"}.intersection(getattr(other, "kinds", ()))
            if isinstance(other, TopKActivation) or (isinstance(other, Factored) and kinds):
                yield f"mechanisms.{other.name}: changes the MLP's products, and so does {name}; keep one of them there"

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Keys and biases."""
        hidden, at = model.hidden_size, r"mlp\.keys\."
        yield ParameterKind(
            "monet_keys",
            (self.experts * 2 * self.heads, hidden),
            rf"{at}projection\.weight",
            "router",
            "router",
            "tensor",
            0,
            channels="mechanisms.monet.experts × 2 keys × heads",
        )
        # A unit meets each head's gate twice: when it is summed, and when the sum is passed on.
        passed, biases = 2 * self.heads * model.ffn_hidden_size, self.experts * hidden
        for name, size, products in (("unit", model.ffn_hidden_size, passed), ("output", biases, biases)):
            kind = (size,), rf"{at}{name}_bias", "biases", None, "tensor", 0
            yield ParameterKind(f"monet_{name}_bias", *kind, products=products)

    @torch.no_grad()
    def initialize(self, chunk: GPTModel, shards: Mapping[Any, Any], seed: int) -> None:
        """Variances of the logits of a token whose channels have the mean square 1."""
        from sparsecod_megatron.model.init import standard_deviation

        for layer in chunk.decoder.layers:
            keys = layer.mlp.keys
            if (shard := shards.get(keys.projection.weight)) is not None:
                std = standard_deviation(keys.model, shard.matrix)
                keys.variance.fill_(std**2 * keys.model.hidden_size)

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """An MLP with keys."""
        from megatron.core.transformer.module import MegatronModule

        mlp = spec.submodules.mlp
        mlp.submodules = replace(
            mlp.submodules,
            linear_fc1=mixed(UnitsInput, mlp.submodules.linear_fc1),
            linear_fc2=mixed(ExpertsOutput, mlp.submodules.linear_fc2),
        )
        keys = functools.partial(
            mixed(ProductKeys, MegatronModule),
            projection=site.provider.column_parallel_linear(),
            model=site.model,
            experts=self.experts,
            heads=self.heads,
            k=self.k,
            is_vertical=self.is_vertical,
        )
        spec.module, spec.params = mixed(HasKeys, spec.module), {**(spec.params or {}), "keys": keys}
        return spec

    def plugin(self, parts: StepParts) -> Plugin:
        """What moves the means and variances."""
        return KeyStatistics(self.name, self.momentum, parts)

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> MonetGroup:
        """How many entries are kept."""
        return MonetGroup(models)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Units in the order of experts, what each output half multiplies, gates in three orders, and sums by head."""
        value, units = rank.value_bytes, model.ffn_hidden_size // rank.tensor
        entries, halves = self.experts // rank.tensor, 2 if self.is_vertical else 1
        ordered = units * (3 if self.is_vertical else 1) + self.heads * model.ffn_hidden_size // self.experts
        gates = 2 * self.heads * (entries * 5 + 4) + 2 * entries * value * (self.heads * halves + 1)
        return {"monet": rank.tokens * (ordered * value + gates)}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Monet:
        """Ten entries, or six; horizontal where the small width has no room for two halves of them."""
        vertical = self.is_vertical and small.ffn_hidden_size % 12 == 0
        experts = 6 if vertical else 10 if small.ffn_hidden_size % 10 == 0 else 6
        form = "vertical" if vertical else "horizontal"
        return replace(self, experts=experts, heads=2, k=min(self.k, 3), decomposition=form)

    def export(self, model: ModelConfig) -> Module:
        """Keys, biases and statistics beside the plain matrices."""
        shapes = {
            "projection.weight": (self.experts * 2 * self.heads, model.hidden_size),
            "unit_bias": (model.ffn_hidden_size,),
            "output_bias": (self.experts * model.hidden_size,),
            "mean": (2 * self.heads,),
            "variance": (2 * self.heads,),
        }
        tensors = tuple(
            ExportedTensor(f"decoder.layers.{layer}.mlp.keys.{name}", f"model.layers.{layer}.mlp.keys.{name}", shape)
            for name, shape in shapes.items()
            for layer in range(model.num_layers)
        )
        return Module(Path(__file__).with_name("monet_sparsecod.py"), asdict(self), tensors)


class MonetGroup:
    """monet_kept, monet_gate_squares: means over tokens, heads and keys of the entries kept, and of Σ g² over them.

    The second is 1 where one entry has it all, and 1 over their number where all have the same.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("monet_kept", "monet_gate_squares")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[Any]) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self._keys: list[tuple[int, Any]] = [(layer.layer_number - 1, layer.mlp.keys) for layer in layers]

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        def observe(layer: int, keys: Any, gates: Tensor) -> None:
            if not in_backward():
                choices = gates.numel() // gates.shape[-3]  # of a rank's entries: of all of them, a share
                for name, values in (("monet_kept", gates > 0), ("monet_gate_squares", gates.square())):
                    sums.add(layer, name, values.sum() * keys.tp_group.size(), choices)

        for layer, keys in self._keys:
            keys.observe = functools.partial(observe, layer, keys)
        try:
            yield
        finally:
            for _, keys in self._keys:
                keys.observe = None

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        return {name: means[name] for name in self.names if name in means}
