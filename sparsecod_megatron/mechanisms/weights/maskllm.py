"""MaskLLM: frozen weights and a learned choice among the six 2:4 masks of every four neighbours.

With π the six logits of a group, o_k its masks, G Gumbel noise, κ and τ scale and temperature of the step:

    p = softmax((κ π + G) / τ)        M = Σ_k p_k o_k        the model computes with  W ⊙ M
    loss − λ ‖W ⊙ M‖²                 π starts at N(0, σ²) + α σ (|o_k ∩ prior| − 1)

W and everything else in the model stays as it is. The logits lie beside the optimizer's slices of their weights, fp32
with an AdamW of their own (betas, eps, clipping and learning rate of the run, times `rate`); weight decay acts on them,
as in the reference. Validation computes with the mask of the largest logit, and the update of the last step makes the
others zero, so that what is exported is exactly 2:4.

Noise and initial logits are hashes of a group's place in the whole model, the step and the seed: the same in every
layout, and again in activation recompute. It is drawn once for a step, where the reference draws for each micro-batch.

Source: Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models (arXiv 2409.17481), and the
scripts of its code for κ, τ, λ, α and σ.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.mechanisms.weights.engine import mask_choices
from sparsecod_megatron.mechanisms.weights.engine.patterns import exceeding_groups, indivisible_groups, smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.places import Piece, Places
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.plugin import STATE_PREFIX, Plugin, StepContext, StepParts

SIZE = mask_choices.GROUP
COUNTERS = "counters"
"""Key of the numbers beside the logits in a checkpoint: seed, updates of the logits, whether the masks are final."""
BYTES_OF_LOGITS = 24
"""Bytes of a weight's share of its group's logits, both moments and gradient: 1.5 fp32 numbers each."""


@dataclass
class MaskLlm(WeightMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "maskllm"
    holds_zeros: ClassVar[bool] = False

    rate: float = above(0, 10.0)
    """Factor on the run's learning rate for the logits."""
    weight_decay: float = at_least(0, 0.1)
    """Decoupled decay of the logits."""
    prior: str = "magnitude"
    """The mask that logits start towards: `magnitude`, the two largest of each group; `none`; or a HuggingFace
    directory of a pruned model, what is not zero in it."""
    prior_strength: float = at_least(0, 3.0)
    """α."""
    std: float = above(0, 0.01)
    """σ of fresh logits."""
    scale_start: float = above(0, 1e2)
    """κ at the first step; linear to `scale_end`."""
    scale_end: float = above(0, 5e2)
    temperature_start: float = above(0, 4.0)
    """τ at the first step; linear to `temperature_end`."""
    temperature_end: float = above(0, 0.05)
    regularizer: float = at_least(0, 1e-5)
    """λ at the first step; linear to 0."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And what would move weights, or has groups that shards cut."""
        yield from super().problems(config)
        rows = [matrix.row for matrix in self.matrices(ParameterTable.of(config))]
        yield from indivisible_groups(self.key("kinds"), f"2:{SIZE}", rows, config)
        name = f"mechanisms.{self.name}"
        if config.optimizer.weight_decay:
            yield (
                f"optimizer.weight_decay: {config.optimizer.weight_decay}, but {name} freezes all weights; set it to 0 "
                f"({self.key('weight_decay')} is that of the logits)"
            )
        for other in config.mechanisms.values():
            if isinstance(other, WeightMechanism) and other is not self:
                yield f"{name}: beside mechanisms.{other.name}, whose weights it would freeze; keep one"
        if config.evaluation.interval:
            yield (
                f"evaluation.interval: {config.evaluation.interval}, but masks of {name} are in the weights of "
                "its last checkpoint alone; set it to 0"
            )
        if config.model.is_moe:
            yield f"{name}: model.num_moe_experts={config.model.num_moe_experts}; it is for dense models"

    def schedule(self, context: StepContext) -> tuple[float, float, float]:
        """κ, τ and λ of a step."""
        share = min((context.step - 1) / max(context.last_step - 1, 1), 1.0)
        ends = (
            (self.scale_start, self.scale_end),
            (self.temperature_start, self.temperature_end),
            (self.regularizer, 0.0),
        )
        scale, temperature, regularizer = (first + share * (last - first) for first, last in ends)
        return scale, temperature, regularizer

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """Half."""
        return [matrix.size / 2 for matrix in self.matrices(table)]

    def zero_pattern(self, layer: int, context: StepContext) -> tuple[int, int] | None:
        """That of the masks."""
        return None if layer in self.skip_layers else (2, SIZE)

    def optimizer_bytes(self, kind: ParameterKind) -> int:
        """The logits' own."""
        return BYTES_OF_LOGITS if self.marks(kind) else 0

    def weight_bytes(self, kind: ParameterKind, value_bytes: int) -> int:
        """Latent weights, while the model computes with others."""
        return value_bytes if self.marks(kind) else 0

    def effective_weight(self, kind: ParameterKind, layer: int, weight: Tensor, context: StepContext) -> Tensor:
        """The weight, in which the last update has made zeros.

        Raises:
            ConversionError: it has not, so that the mask is in the logits alone.
        """
        if self.has_mask(kind, layer) and exceeding_groups(weight, 2, SIZE):
            raise ConversionError(
                f"mechanisms.{self.name}: the masks become zeros with the update of the last step, "
                f"{context.last_step}, and this checkpoint is of step {context.step}; finish the run first"
            )
        return weight

    def plugin(self, parts: StepParts) -> LearnedMasks:
        """Learns the masks."""
        return LearnedMasks(self, parts)

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> None:
        """None: every layer has the same share."""


class LearnedMasks(Plugin):
    """Logits, and their optimizer.

    Args:
        settings: of the run.
        parts: what it acts on.

    Attributes:
        places: of the weights.
        logits: of each piece, [groups, 6] fp32.
        seed: of noise and initial logits; a checkpoint's is kept, whatever `train.seed` says.
        window_bytes: of the weights that the model computes with, while a window is open.

    Raises:
        ConfigError: a slice of some process cuts a group.
    """

    has_window: ClassVar[bool] = True

    def __init__(self, settings: MaskLlm, parts: StepParts) -> None:
        self.name, self.settings, self._parts = settings.name, settings, parts
        self.places = Places(parts, settings.has_mask, settings.marks)
        self._require_whole_groups()
        sizes = [len(piece.master) // SIZE for piece in self.places.pieces]
        self.logits, self._means, self._squares = (
            [torch.zeros(size, len(mask_choices.MASKS), device=self.places.device) for size in sizes] for _ in range(3)
        )
        self._gradients: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self.seed, self.window_bytes = parts.config.train.seed, 0
        self._updates, self._is_final, self._restored = 0, False, False
        self._norm = torch.zeros(())

    @torch.no_grad()
    def weights_replaced(self) -> None:
        """Draw logits for these weights, unless a checkpoint had some."""
        if self._restored:
            return
        for number in range(len(self.logits)):
            self.logits[number] = self.settings.std * mask_choices.normal(self._groups(number), self.seed)
        for number, kept in self._prior():
            agreement = mask_choices.agreement(kept) - 1
            self.logits[number] += self.settings.prior_strength * self.settings.std * agreement

    def _prior(self) -> Iterator[tuple[int, Tensor]]:
        """Pieces, and which weights the prior keeps of each, [groups, 4] bool. Local."""
        if self.settings.prior == "none":
            return
        if self.settings.prior == "magnitude":
            for number, piece in enumerate(self.places.pieces):
                yield number, ~smallest_of_each(piece.master.view(-1, SIZE), 2, SIZE)
            return
        from sparsecod_megatron.mechanisms.directory_shards import directory_shards, opened_directory

        parts, key = self._parts, self.settings.key("prior")
        source = opened_directory(self.settings.prior, parts.config, key=key)
        owned: dict[Tensor, int] = {piece.shard.parameter: number for number, piece in enumerate(self.places.pieces)}
        for target, values in directory_shards(source, parts.config, parts.models, parts.groups, key=key):
            if target in owned:
                yield owned[target], self.places.pieces[owned[target]].slice_of(values != 0).view(-1, SIZE)

    @contextlib.contextmanager
    def effective_weights(self, context: StepContext) -> Iterator[None]:
        """W ⊙ M in the parameters: soft masks where it trains, else those of the largest logits. Collective."""
        if self._is_final and context.step < context.last_step:
            raise ConfigError(
                f"mechanisms.{self.name}: the masks of this run became final at its last step, before "
                f"{context.last_step}; put train.train_steps back, or start another run from earlier weights"
            )
        latent: list[tuple[torch.nn.Parameter, Tensor]] = []
        is_soft = torch.is_grad_enabled() and not self._is_final
        with torch.no_grad():
            self._probabilities = (
                [self._choice(number, context) for number in range(len(self.logits))] if is_soft else []
            )
            owned = {piece.shard.parameter: number for number, piece in enumerate(self.places.pieces)}
            for _, shard in self.places.shards:
                parameter = shard.parameter
                latent.append((parameter, parameter.data))
                parameter.data = self._masked(parameter, owned.get(parameter), is_soft=is_soft)
        self.window_bytes = sum(weight.nbytes for _, weight in latent)
        try:
            yield
        finally:
            for parameter, weight in latent:
                parameter.data = weight

    @torch.no_grad()
    def on_gradients(self, context: StepContext) -> None:
        """Gradients of the logits, clipped together; none of anything else. Collective over all processes."""
        scale, temperature, regularizer = self.settings.schedule(context)
        self._gradients = [
            mask_choices.logit_gradient(
                probabilities,
                piece.master,
                piece.gradient,
                scale=scale,
                temperature=temperature,
                regularizer=regularizer,
            )
            for piece, probabilities in zip(self.places.pieces, self._probabilities, strict=False)
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.places.device)
        for gradient in self._gradients:
            total += gradient.double().square().sum()
        dist.all_reduce(total)
        self._norm, clip = total.sqrt(), self._parts.config.optimizer.clip_grad
        if clip:
            factor = (clip / (self._norm + 1e-6)).clamp(max=1.0).float()
            self._gradients = [gradient * factor for gradient in self._gradients]
        for model in self._parts.models:
            for parameter in model.parameters():
                # Not zeroed: what is non-finite stays so, and the step is judged by the norm.
                parameter.main_grad.mul_(0.0)

    @torch.no_grad()
    def after_update(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """AdamW of the logits; with the last step the masks become zeros."""
        for number, piece in enumerate(self.places.pieces):
            if piece.optimizer is optimizer and self._gradients:
                self._step(number, piece)
                if context.step >= context.last_step:
                    piece.master.mul_(mask_choices.hardest(self.logits[number]).flatten())

    def step_ended(self, context: StepContext, *, updated: bool) -> None:
        """Count updates, and remember that the masks are final."""
        if updated and not self._is_final:
            self._updates += 1
            self._is_final = context.step >= context.last_step
        self._gradients, self._probabilities = [], []

    def metrics(self, context: StepContext) -> dict[str, float]:
        """Norm of the logits' gradient before clipping (`grad_norm` is 0), κ and τ."""
        scale, temperature, _ = self.settings.schedule(context)
        return {"mask_grad_norm": self._norm.item(), "mask_scale": scale, "mask_temperature": temperature}

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Logits and moments, each as two tensors of their weight's shape. Collective over all processes."""
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map

        shards = [*(shard for _, shard in self.places.shards), *self.places.shards_without]
        places = get_param_id_to_sharded_param_map(model_state, [shard.parameter for shard in shards])
        owned = {piece.shard.parameter: number for number, piece in enumerate(self.places.pieces)}
        state: dict[str, Any] = {}
        for index, shard in enumerate(shards):
            number = owned.get(shard.parameter)
            for kind, values in self._kept().items():
                halves = [None, None] if number is None else mask_choices.halves(values[number])
                for half, part in enumerate(halves):
                    whole = self._gathered(shard.parameter, number, part, torch.float32)
                    place = places[index]
                    dtype = {"dtype": torch.float32} if hasattr(place, "dtype") else {}
                    key = f"{STATE_PREFIX}{self.name}.{kind}{half}.{place.key}"
                    state[f"{kind}{half}.{shard.matrix.name}"] = dataclasses.replace(
                        place, key=key, data=whole, **dtype
                    )
        numbers = torch.tensor([self.seed, self._updates, self._is_final], dtype=torch.float64)
        key = f"{STATE_PREFIX}{self.name}.{COUNTERS}"
        state[COUNTERS] = ShardedTensor.from_rank_offsets(key, numbers, replica_id=dist.get_rank())
        return state

    def restore(self, tensors: dict[str, Any]) -> None:
        """Those of a checkpoint."""
        self._restored = True
        seed, updates, is_final = tensors[COUNTERS].tolist()
        self.seed, self._updates, self._is_final = round(seed), round(updates), bool(is_final)
        for number, piece in enumerate(self.places.pieces):
            for kind, values in self._kept().items():
                halves = [
                    piece.slice_of(tensors[f"{kind}{half}.{piece.shard.matrix.name}"]).to(self.places.device)
                    for half in range(2)
                ]
                values[number] = mask_choices.joined(*halves)

    def _kept(self) -> dict[str, list[Tensor]]:
        return {"logits": self.logits, "exp_avg": self._means, "exp_avg_sq": self._squares}

    def _groups(self, number: int) -> Tensor:
        """Place in the whole model of each group of a piece, [groups] int64."""
        return self.places.positions(number)[::SIZE] // SIZE

    def _choice(self, number: int, context: StepContext) -> Tensor:
        scale, temperature, _ = self.settings.schedule(context)
        noise = mask_choices.gumbel(self._groups(number), self.seed, context.step)
        return mask_choices.probabilities(self.logits[number], noise, scale=scale, temperature=temperature)

    def _masked(self, parameter: torch.nn.Parameter, number: int | None, *, is_soft: bool) -> Tensor:
        """W ⊙ M of a shard, from all data-parallel ranks. Collective over them."""
        part = None
        if number is not None:
            soft = self._probabilities[number] if is_soft else None
            mask = mask_choices.hardest(self.logits[number]) if soft is None else mask_choices.mixture(soft)
            part = self.places.pieces[number].slice_of(parameter.data) * mask.flatten()
        return self._gathered(parameter, number, part, parameter.dtype)

    def _gathered(self, parameter: Tensor, number: int | None, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Something of a shard's shape from the slices of all data-parallel ranks. Collective over them."""
        whole = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
        if number is not None and part is not None:
            whole[slice(*self.places.pieces[number].span)] = part.to(dtype)
        if self.places.groups.dp_cp.size() > 1:
            dist.all_reduce(whole, group=self.places.groups.dp_cp)
        return whole.view(parameter.shape)

    def _step(self, number: int, piece: Piece) -> None:
        group, count = piece.group, self._updates + 1
        first, second = group["betas"]
        logits, gradient = self.logits[number], self._gradients[number]
        means, squares = self._means[number], self._squares[number]
        means.lerp_(gradient, 1 - first)
        squares.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rate = group["lr"] * self.settings.rate
        logits.mul_(1 - rate * self.settings.weight_decay)
        denominator = (squares / (1 - second**count)).sqrt_().add_(group["eps"])
        logits.addcdiv_(means, denominator, value=-rate / (1 - first**count))

    def _require_whole_groups(self) -> None:
        cuts = any(place % SIZE for piece in self.places.pieces for place in piece.span)
        found = torch.tensor(float(cuts), device=self.places.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        if found:
            raise ConfigError(
                f"mechanisms.{self.name}: the slice of a data-parallel rank cuts groups of {SIZE}; set "
                "megatron.pad_buckets_for_high_nccl_busbw=true, or use fewer ranks"
            )
