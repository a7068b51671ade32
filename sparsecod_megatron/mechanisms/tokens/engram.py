"""Engram: layers that add what a table stores for the n-grams which end at each token, before their attention.

With c the canonical ids of tokens (alike up to case, accents and spaces), for n-grams of n = 2 … N tokens, K heads each

    row of head k    (⊕_{j<n} c_{t-j} · m_j)  mod  p_{n,k}
    e_t              all heads' rows, one after the other           [(N - 1) · width]
    key, value       W_K e_t, W_V e_t                               [H]
    gate             σ(sign(s) √max(|s|, 1e-6)),   s = RMS(x_t) · RMS(key) / √H
    x_t              x_t + gate · value + SiLU(conv(RMS(value)))_t

with odd multipliers m of each layer, a prime p of its own for every head of every layer, and a causal convolution of
each channel, of 4 taps N tokens apart, that starts at zero. An n-gram that reaches over the beginning of a sample, or
of a document whose neighbours are masked, stands for nothing: its rows are zero. A look-up costs no FLOPs, W_K and W_V
2 · 2 · H · (N - 1) · width per token and forward pass.

Source: Cheng et al., Conditional Memory via Scalable Lookup (arXiv 2601.07372). Formulas were read in
AI-Hypercomputer/maxtext, src/maxtext/layers/engram.py. What differs here: there the gated value is what the convolution
normalises, from which the gate cancels up to the norm's epsilon, so that here it is left out; projections have no bias;
before the beginning of a sample there are no n-grams in place of a padding token's; multipliers come from SHA-256 and
products have 62 bits. Not found in a public source: the tables' initial values (here as an embedding's), and that they
learn at five times the rate and do not decay (`rate`; `optimizer.no_weight_decay: [norms, biases, embeddings]`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import DataConfig, ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.tokens.engram_sparsecod import TAPS, halo_of, table_sizes
from sparsecod_megatron.mechanisms.tokens.layer import token_layer
from sparsecod_megatron.mechanisms.tokens.settings import small_layers, token_problems
from sparsecod_megatron.seams.mechanism import ExportedTensor, LayerSite, Mechanism, Module, RankShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch import Tensor

    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class Engram(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "engram"
    adds_modules: ClassVar[tuple[str, ...]] = ("memory",)
    mixes_tokens: ClassVar[bool] = True

    layers: list[int] = field(default_factory=lambda: [1])
    """Layers (from 0) with a memory."""
    max_ngram: int = at_least(2, 3)
    """Tokens of the longest n-gram, N."""
    heads: int = at_least(1, 8)
    """Hashes of each n-gram, each with rows of its own."""
    width: int = at_least(1, 256)
    """Numbers stored for an n-gram of one length, over all heads."""
    table_size: int = at_least(2, 100_000)
    """Rows of a head's table, at least; the next unused prime."""
    rate: float = above(0, 5.0)
    """Factor on the learning rate of the tables."""
    seed: int = at_least(0, 0)
    """Which hashes there are."""

    @property
    def memory_width(self) -> int:
        """Numbers that a token's n-grams of all lengths stand for."""
        return (self.max_ngram - 1) * self.width

    def sizes(self, layer: int) -> list[list[int]]:
        """Rows of each head's table in a layer (from 0), by length of the n-gram."""
        orders = self.max_ngram - 1
        place = self.layers.index(layer) * orders
        return table_sizes(self.table_size, len(self.layers) * orders, self.heads)[place : place + orders]

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Layers and sizes that do not fit, and what multiplies or scales otherwise."""
        yield from token_problems(self, config, self.layers)
        tensor = config.parallel.tensor_model_parallel_size
        if self.width % (self.heads * tensor):
            among = f"heads={self.heads}" + (f" × parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else "")
            yield f"{self.key('width')}: {self.width} is not divisible by {among}; change one of them"
        if config.precision.fp8:
            yield (
                f"precision.fp8_recipe: {config.precision.fp8_recipe}, but mechanisms.engram projects numbers of "
                "tokens that FP8 cannot multiply; remove it"
            )
        if config.model.mup_base_hidden_size is not None:
            yield "model.mup_base_hidden_size: muP has no rule for the memory of mechanisms.engram; remove one of them"

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Tables, projections, norms and convolution."""
        if layer not in self.layers:
            return
        hidden, at = model.hidden_size, r"memory\."
        yield ParameterKind(
            "engram_table",
            (sum(map(sum, self.sizes(layer))), self.width // self.heads),
            rf"{at}table\.weight",
            "embeddings",
            "embedding",
            "tensor",
            1,
            looked_up=True,
            rows_read=(self.max_ngram - 1) * self.heads,
            rate=self.rate,
        )
        for name in ("key", "value"):
            shape, pattern = (hidden, self.memory_width), rf"{at}{name}\.weight"
            yield ParameterKind(f"engram_{name}", shape, pattern, init="mlp_input", split="tensor", dimension=1)
        for name in ("query", "key", "value"):
            yield ParameterKind(f"engram_{name}_norm", (hidden,), rf"{at}{name}_norm\.weight", "norms")
        taps = TAPS * hidden
        yield ParameterKind("engram_taps", (taps,), rf"{at}taps", "biases", products=taps)

    def layers_differ(self, model: ModelConfig) -> bool:
        """Layers with a memory have more."""
        return True

    def token_halo(self, model: ModelConfig) -> int:
        """As far as n-gram and convolution reach."""
        return halo_of(self.max_ngram)

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """A memory in the layer."""
        if site.layer not in self.layers:
            return spec
        from sparsecod_megatron.mechanisms.tokens.engram_memory import memory_spec

        return token_layer(spec, memory=memory_spec(self, site))

    def read_data(self, models: Sequence[GPTModel], data: DataConfig) -> None:
        """Which tokens are written alike, by the tokenizer; without one each stands for itself."""
        memories = dict(_memories(models))
        if data.tokenizer is None or not memories:
            return
        from sparsecod_megatron.data.tokenizer import load_tokenizer
        from sparsecod_megatron.mechanisms.tokens.canonical import canonical_ids

        tokenizer = load_tokenizer(data.tokenizer)
        for memory in memories.values():
            memory.canonical.copy_(canonical_ids(tokenizer, len(memory.canonical)))

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> Gates:
        """Mean gate."""
        return Gates(models)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Rows and what stands in them; in and behind three norms, and before SiLU; the few tokens of a halo apart."""
        if layer not in self.layers:
            return {}
        rows = (self.max_ngram - 1) * self.heads
        channels = self.memory_width // rank.tensor * rank.value_bytes
        return {"memory": rank.tokens * (rows * 9 + channels + 10 * model.hidden_size * rank.value_bytes)}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Engram:
        """Layers at the same depths, and small tables."""
        layers, heads = small_layers(self.layers, model, small), min(self.heads, 2)
        size = min(self.table_size, 97)
        return dataclasses.replace(self, layers=layers, heads=heads, width=heads * 6, table_size=size)

    def export(self, model: ModelConfig) -> Module:
        """A memory in the layer."""
        assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
        tensors: list[ExportedTensor] = []
        for layer in self.layers:
            shapes = {kind.pattern: kind.shape for kind in self.parameters(model, layer)}
            for pattern, shape in shapes.items():
                name = pattern.replace("\\", "")
                tensors.append(ExportedTensor(f"decoder.layers.{layer}.{name}", f"model.layers.{layer}.{name}", shape))
            name, shape = "memory.canonical", (model.vocab_size,)
            ours, theirs = f"decoder.layers.{layer}.{name}", f"model.layers.{layer}.{name}"
            tensors.append(ExportedTensor(ours, theirs, shape, is_integer=True))
        settings = dataclasses.asdict(self)
        return Module(code=Path(__file__).with_name("engram_sparsecod.py"), settings=settings, tensors=tuple(tensors))


def _memories(models: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Layer (from 0) and memory of each that these models have."""
    for layer in (layer for model in models for layer in model.decoder.layers):
        if (memory := getattr(layer, "memory", None)) is not None:
            yield layer.layer_number - 1, memory


class Gates:
    """memory_gate: mean over all tokens of how much of its memory a token takes, from 0 to 1.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("memory_gate",)
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[Any]) -> None:
        self._memories = list(_memories(models))

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Sum in every training forward pass inside the block. Local."""
        from sparsecod_megatron.metrics.hooks import in_backward

        def observe(layer: int, gate: Tensor) -> None:
            if not in_backward():
                sums.add(layer, "memory_gate", gate.detach().double().sum(), gate.numel())

        for layer, memory in self._memories:
            memory.observe = partial(observe, layer)
        try:
            yield
        finally:
            for _, memory in self._memories:
                memory.observe = None

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none where there is no memory."""
        return {"memory_gate": means["memory_gate"]} if "memory_gate" in means else {}
