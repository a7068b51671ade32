"""Shape of the channel distribution and turn of the residual stream, for every layer.

Definitions, for a tensor x [tokens, channels], with moments m biased (divided by the number of channels) and centred
on the token's own mean; `*` is out, attn or mlp:

    *_skew, *_kurt          mean over tokens of m3 / m2^1.5 and of m4 / m2²
    *_skew_std, *_kurt_std  their standard deviation over tokens (population)
    *_outlier_frac          share of elements with |x − mean| > 3 √m2
    *_top_mass              mean over tokens of ‖ten largest |x|‖ / ‖x‖, a share of the L2 norm, not of its square
    massive                 largest |x| of the residual stream after the layer
    cos                     mean over tokens of the cosine between the residual stream before and after the layer

A token whose channels are all equal has no shape: it counts as 0 in skewness, kurtosis (which is at least 1 for any
other token) and outliers. A token of zeros counts as 0 in top mass and cosine.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.metrics.hooks import observing

PLACES_WITH_SHAPES = ("out", "attn", "mlp")
SHAPES = ("skew", "kurt", "outlier_frac", "top_mass")
SPREAD = SHAPES[:2]
"""Shapes whose standard deviation over tokens is kept too; they come first, so that one slice squares them."""

TOP_CHANNELS = 10
OUTLIER_STD = 3.0
CONSTANT_STD = 16.0
"""Standard deviations below this many rounding steps of the token's mean are rounding: the token counts as constant."""
CHUNK_ELEMENTS = 1 << 19
"""Elements of a chunk on a CPU: fewer stay in the cache, more save calls."""
CHANNELS_TO_SORT = 512
"""Channels up to which sorting them on a CPU is faster than selecting the largest."""

TokenFunction = Callable[..., Tensor]
"""[tokens, channels] tensors → [statistics, tokens]."""


class MomentsGroup:
    """cos, massive, and for out, attn, mlp: skew, skew_std, kurt, kurt_std, outlier_frac, top_mass.

    On CUDA the same functions run as kernels fused by torch.compile.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = (
        *(f"{place}_{shape}" for place in PLACES_WITH_SHAPES for shape in SHAPES),
        *(f"{place}_{shape}_square" for place in PLACES_WITH_SHAPES for shape in SPREAD),
        "cos",
    )
    maxima: tuple[str, ...] = ("massive",)

    def __init__(self, models: Sequence[GPTModel]) -> None:
        self.models = list(models)
        # Compiled at the first use, once per function: a run that never collects moments does not wait for a compiler.
        self._compiled = functools.cache(functools.partial(torch.compile, fullgraph=True))

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Local."""
        entering: dict[int, Tensor] = {}
        buffers: list[Tensor] = []

        @torch.no_grad()
        def observe(layer: int, place: str, x: Tensor) -> None:
            if place == "attn_in":
                entering[layer] = x
            if place not in PLACES_WITH_SHAPES:
                return
            if not buffers and not x.is_cuda:
                # Once for the whole step: the compiled kernels of CUDA need none.
                buffers.append(temporaries(x))
            shapes = self._per_token(token_shapes, x, buffers=buffers)
            self._add_shapes(sums, layer, place, shapes)
            if place == "out":
                cosines = self._per_token(token_cosines, entering.pop(layer), x, buffers=buffers)
                sums.add(layer, "cos", cosines.sum(), cosines.numel())

        with observing(self.models, observe):
            yield

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        plain = {name: means[name] for name in self.names if not name.endswith("_square")}
        # Clamped, because rounding can take the difference of two nearly equal numbers below zero.
        spreads = {
            f"{name}_std": math.sqrt(max(means[f"{name}_square"] - means[name] ** 2, 0.0))
            for name in (f"{place}_{shape}" for place in PLACES_WITH_SHAPES for shape in SPREAD)
        }
        return {**plain, **spreads, "massive": means["massive"]}

    def _add_shapes(self, sums: LayerAccumulator, layer: int, place: str, shapes: Tensor) -> None:
        tokens = shapes.shape[1]
        names = [f"{place}_{shape}" for shape in SHAPES]
        sums.add_many(layer, names, shapes[: len(SHAPES)].sum(dim=1), tokens)
        names = [f"{place}_{shape}_square" for shape in SPREAD]
        sums.add_many(layer, names, shapes[: len(SPREAD)].square().sum(dim=1), tokens)
        if place == "out":
            sums.add_maximum(layer, "massive", shapes[-1].max())

    def _per_token(self, function: TokenFunction, *tensors: Tensor, buffers: Sequence[Tensor] = ()) -> Tensor:
        """`function` of tensors [..., channels], in float64 [statistics, tokens]; `buffers` as `in_chunks` takes it."""
        if tensors[0].is_cuda:
            return self._compiled(function)(*(x.reshape(-1, x.shape[-1]) for x in tensors)).double()
        return in_chunks(function, *tensors, buffers=buffers).double()


def temporaries(x: Tensor) -> Tensor:
    """What a chunk of x [..., channels] needs, [2, elements]; kept for all chunks, for new memory costs page faults."""
    return x.new_empty((2, max(CHUNK_ELEMENTS, x.shape[-1])), dtype=torch.promote_types(x.dtype, torch.float32))


def in_chunks(function: TokenFunction, *tensors: Tensor, buffers: Sequence[Tensor] = ()) -> Tensor:
    """`function` of tensors [..., channels], a few tokens at a time.

    Args:
        function: takes chunks [tokens, channels], and `buffers`, their temporaries [2, tokens, channels].
        tensors: alike in shape.
        buffers: `temporaries` to use.
    """
    channels = tensors[0].shape[-1]
    (memory,) = buffers or (temporaries(tensors[0]),)
    chunks = zip(*(x.reshape(-1, channels).split(max(1, CHUNK_ELEMENTS // channels)) for x in tensors), strict=True)
    return torch.cat(
        [function(*chunk, buffers=memory[:, : chunk[0].numel()].view(2, *chunk[0].shape)) for chunk in chunks], dim=1
    )


def token_shapes(x: Tensor, *, buffers: Sequence[Tensor | None] | Tensor = (None, None)) -> Tensor:
    """Shape of each token's distribution over channels.

    Args:
        x: [tokens, channels], any float type.
        buffers: two temporaries, as large as x, in fp32 or better; new ones by default.

    Returns:
        [len(SHAPES) + 1, tokens] in fp32 or better: the SHAPES, then the largest |x|.
    """
    channels = x.shape[-1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny, epsilon = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    squares_buffer, z_buffer = buffers
    squares = torch.mul(x, x, out=squares_buffer)
    # Reorders the squares of a token on a CPU; only their sum is needed below.
    largest = _largest(squares, min(TOP_CHANNELS, channels))
    top_mass = (largest.sum(dim=-1) / squares.sum(dim=-1).clamp_min(tiny)).sqrt()
    peak = largest.amax(dim=-1).sqrt()

    mean = x.mean(dim=-1, keepdim=True)
    z = torch.sub(x, mean, out=z_buffer)
    std = torch.linalg.vector_norm(z, dim=-1, keepdim=True) / math.sqrt(channels)
    has_shape = std > (CONSTANT_STD * epsilon * mean.abs()).clamp_min(tiny)
    # Where `std` is 0, the infinite 1 / std is not chosen; the token becomes zeros and counts 0 below.
    z *= torch.where(has_shape, 1 / std, 0.0)
    squares = torch.mul(z, z, out=squares)
    # Σ z⁴ as the norm of z², which needs no third temporary.
    kurt = torch.linalg.vector_norm(squares, dim=-1).square() / channels
    # E[z³ − 3z] is E[z³] where E[z] = 0, and unlike it does not feel, to first order, the rounding of the mean.
    skew = z.mul_(squares.sub_(3.0)).mean(dim=-1)
    # `squares` holds z² − 3 by now, so the limit is shifted too; `gt_` leaves 0 and 1 in their place.
    outlier_frac = squares.gt_(OUTLIER_STD**2 - 3.0).mean(dim=-1)
    return torch.stack([skew, kurt, outlier_frac, top_mass, peak])


def token_cosines(before: Tensor, after: Tensor, *, buffers: Sequence[Tensor | None] | Tensor = (None, None)) -> Tensor:
    """Cosine of each token with itself after the layer, [1, tokens], from two [tokens, channels] of any float type."""
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    products = torch.mul(before, after, out=buffers[0])
    return (products.sum(dim=-1) / norms.clamp_min(torch.finfo(wide).tiny)).unsqueeze(0)


def _largest(squares: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, [tokens, count]; on a CPU the rows are reordered.

    There numpy's vectorised sorting and selection take about a tenth of the time of torch.topk.
    """
    channels = squares.shape[-1]
    if squares.device.type != "cpu":
        return squares.topk(count, dim=-1, sorted=False).values
    if channels <= CHANNELS_TO_SORT:
        squares.numpy().sort(axis=-1)
    else:
        squares.numpy().partition(channels - count, axis=-1)
    return squares[:, -count:]
