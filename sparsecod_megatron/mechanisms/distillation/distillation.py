"""Distillation: the loss of a run plus how far its residual stream and its predictions are from a teacher's.

    loss + squarehead · Σ over layers (squarehead of the layer) + kl · T² KL(teacher ‖ student)

The layers' term is taken behind each layer; of the last one behind the final norm, where the reference takes it. Each
pipeline stage adds the terms of its own layers to the gradients of what they compute, so that no stage has to know of
another, and the reported loss, by which a run is judged, stays the cross entropy. Every token counts, as in the loss.

The teacher sees each micro-batch before the student. What it finds waits in a queue per place: chunks see micro-batches
in one order, forward as in the backward passes of activation recompute, which ask again for what has been used.

Source: SquareHead, Kurtic et al. (arXiv 2310.06927); see `terms.py`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.seams.mechanism import Folds, Mechanism, RankShape
from sparsecod_megatron.seams.plugin import STATE_PREFIX, Plugin, StepContext, StepParts

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

DIGEST = "digest"
"""Key of the teacher's in a checkpoint."""


@dataclass
class Distillation(Mechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "distillation"
    weights_need_state: ClassVar[bool] = False

    teacher: str = ""
    """HuggingFace directory of a model with the run's layers, width and vocabulary; `:fresh:` is random weights of the
    run's own shape, for audits."""
    squarehead: float = at_least(0, 1.0)
    """Factor on the relative squared distance of the residual streams, summed over layers."""
    kl: float = at_least(0, 0.0)
    """Factor on T² KL(teacher ‖ student), mean over tokens."""
    temperature: float = above(0, 1.0)
    """T: divides both models' logits in that term."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No teacher, nothing to learn of it, or a model whose output layer is called more than once."""
        if not self.teacher:
            yield f"{self.key('teacher')}: not set; give a HuggingFace directory"
        if not self.squarehead and not self.kl:
            yield f"{self.key('squarehead')}: 0, and {self.key('kl')}=0 too; raise one, or remove the mechanism"
        if config.megatron.get("mtp_num_layers"):
            yield f"megatron.mtp_num_layers: more predictions than one have no teacher in {self.name}; remove it"

    def plugin(self, parts: StepParts) -> Distiller:
        """Runs the teacher, and adds the terms."""
        return Distiller(self, parts)

    def weight_bytes(self, kind: ParameterKind, value_bytes: int) -> int:
        """The teacher's, which is of the student's shape as far as a configuration says, and never in FP8."""
        return max(value_bytes, 2)

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Gradients of the terms; of the layer's own, each rank of sequence parallelism keeps but its part."""
        numbers = rank.tokens * model.hidden_size if self.squarehead else 0
        if self.kl and layer == model.num_layers - 1:
            numbers += rank.tokens * (model.vocab_size or 0) // rank.tensor
        return {"distillation": numbers * rank.value_bytes}

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Distillation:
        """With a teacher that has the small shape."""
        from sparsecod_megatron.mechanisms.distillation.teacher import FRESH

        return replace(self, teacher=FRESH)

    def export(self, model: ModelConfig) -> Folds:
        """The student's weights say it all."""
        return Folds()


@dataclass(frozen=True)
class Found:
    """What the teacher computed at a place of a micro-batch.

    Attributes:
        states: residual stream, [S_local, B, H].
        weights: of each token's squared distance, [S_local, B].
    """

    states: Tensor
    weights: Tensor


class Distiller(Plugin):
    """Observes both models at the same places.

    Args:
        settings: of the run.
        parts: what it acts on.

    Attributes:
        values: squarehead and kl of this step without their factors, summed over what this rank adds, [2] fp64; after
            the step means over the global batch.
        kept_bytes: most that gradients of terms have held at a time, between forward and backward passes.
    """

    def __init__(self, settings: Distillation, parts: StepParts) -> None:
        from sparsecod_megatron.mechanisms.distillation.teacher import Teacher

        self.name, self.settings, self._parts = settings.name, settings, parts
        self.teacher = Teacher(settings.teacher, parts.config, parts.groups, key=settings.key("teacher"))
        self.values = torch.zeros(2, dtype=torch.float64, device=next(parts.models[0].parameters()).device)
        self._found: defaultdict[int, deque[Found]] = defaultdict(deque)
        self._again: defaultdict[int, deque[Found]] = defaultdict(deque)
        self._final: Found | None = None
        self._num_microbatches = 1
        self.kept_bytes, self._kept = 0, 0
        for model in self.teacher.models:
            for place, module in _places(model):
                module.register_forward_hook(partial(self._keep, place))

    def companions(self) -> Sequence[torch.nn.Module]:
        """The teacher."""
        return self.teacher.chunks

    @contextlib.contextmanager
    def extra_loss(self, context: StepContext, num_microbatches: int) -> Iterator[None]:
        """Observe the student. Local."""
        self.values.zero_()
        self._num_microbatches = num_microbatches
        hooks = []
        for chunk, model in enumerate(self._parts.models):
            hooks += [module.register_forward_hook(partial(self._compare, place)) for place, module in _places(model)]
            if self.settings.kl and model.post_process:
                hooks.append(model.output_layer.register_forward_hook(partial(self._compare_logits, chunk)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._found.clear()
            self._again.clear()

    def step_ended(self, context: StepContext, *, updated: bool) -> None:
        """Share the values. Collective over all processes."""
        dist.all_reduce(self.values)
        replicas = dist.get_world_size() // self._parts.groups.pp.size()
        self.values /= replicas * self._num_microbatches

    def metrics(self, context: StepContext) -> dict[str, float]:
        """Both terms without their factors, means over the step's global batch."""
        squarehead, kl = self.values.tolist()
        terms = {"distillation_squarehead": squarehead, "distillation_kl": kl}
        return {name: value for name, value in terms.items() if getattr(self.settings, name.split("_")[1])}

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """The digest of the teacher's files. Collective over all processes."""
        from megatron.core.dist_checkpointing import ShardedTensor

        key = f"{STATE_PREFIX}{self.name}.{DIGEST}"
        return {DIGEST: ShardedTensor.from_rank_offsets(key, self.teacher.digest.clone(), replica_id=dist.get_rank())}

    def restore(self, tensors: dict[str, Any]) -> None:
        """Refuse another teacher than the checkpoint's.

        Raises:
            CheckpointError: its files are not those that the run began with.
        """
        if not torch.equal(tensors[DIGEST].cpu(), self.teacher.digest):
            raise CheckpointError(
                f"{self.settings.key('teacher')}: {self.settings.teacher} holds other files than the checkpoint was "
                "trained with; restore them, or start another logging.run_dir with checkpoint.init_from"
            )

    @torch.no_grad()
    def _keep(self, place: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """A teacher's state, for the student's turn. Collective over ranks that share its sequences."""
        from sparsecod_megatron.mechanisms.distillation.terms import inverse_squares

        states, config, groups = _state(output), self._parts.config, self._parts.groups
        samples, size = self._samples(states), config.data.seq_length * states.shape[-1]
        count, sharing = config.train.micro_batch_size, [groups.cp]
        if config.parallel.sequence_parallel:
            sharing.append(groups.tp)
        weights = inverse_squares(states, samples, count, size, sharing) / count
        self._found[place].append(Found(states.detach(), weights))

    def _samples(self, states: Tensor) -> Tensor:
        """Which sequence of the micro-batch each token is of, [S_local, B]."""
        config, tp = self._parts.config, self._parts.groups.tp
        rows, columns = states.shape[:2]
        if not config.data.reset_attention_mask:
            return torch.arange(columns, device=states.device).expand(rows, columns)
        # The sequences of a micro-batch lie one behind the other, over all tensor-parallel ranks.
        first = tp.rank() * rows if config.parallel.sequence_parallel else 0
        places = torch.arange(first, first + rows, device=states.device)
        return (places // config.data.seq_length)[:, None]

    def _compare(self, place: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Add a layer's term to the gradient of what it computes. Local."""
        from sparsecod_megatron.mechanisms.distillation.terms import squarehead
        from sparsecod_megatron.metrics.hooks import in_backward

        again = in_backward()
        found = (self._again if again else self._found)[place].popleft()
        if not again:
            self._final = found
            if not torch.is_grad_enabled():  # activation recompute, which runs this place again
                self._again[place].append(found)
        if not self.settings.squarehead:
            return
        states, parallel = _state(output), self._parts.config.parallel
        # Gradients are averaged over context-parallel ranks, each of which has a part of the sum.
        shares = parallel.context_parallel_size
        value, gradient = squarehead(states, found.states, found.weights * shares)
        if not again:
            parts = self._parts.groups.tp.size() if parallel.sequence_parallel else 1
            self.values[0] += value.detach() * parts
        if states.requires_grad:
            self._add(states, gradient * self.settings.squarehead)

    def _compare_logits(self, chunk: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Add the predictions' term. Collective over the tensor-parallel group."""
        from sparsecod_megatron.mechanisms.distillation.terms import kl_divergence

        found, self._final = self._final, None
        assert found is not None, "the output layer follows the last place that is compared"
        theirs = self.teacher.logits(chunk, found.states)
        value, gradient = kl_divergence(output[0], theirs, self.settings.temperature, self._parts.groups.tp)
        self.values[1] += value
        self._add(output[0], gradient * self.settings.kl)

    def _add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Let a backward pass find a gradient at a tensor beside the one that comes there."""
        config = self._parts.models[0].config
        # What the schedule multiplies the loss by before its backward pass.
        scale = 1.0 if config.grad_scale_func is None else config.grad_scale_func(gradient.new_ones(()))
        own = (gradient * (scale / self._num_microbatches)).to(tensor.dtype)
        self._kept += own.nbytes
        self.kept_bytes = max(self.kept_bytes, self._kept)

        def added(incoming: Tensor) -> Tensor:
            self._kept -= own.nbytes
            return incoming + own

        tensor.register_hook(added)


def _places(model: GPTModel) -> list[tuple[int, torch.nn.Module]]:
    """Modules whose outputs are compared, with the layer (from 0) that they are behind; of the last one its norm."""
    places = {layer.layer_number - 1: layer for layer in model.decoder.layers}
    norm = getattr(model.decoder, "final_layernorm", None)
    if norm is not None:
        places[max(places)] = norm
    return list(places.items())


def _state(output: Any) -> Tensor:
    """[S_local, B, H] of a layer, which gives a context too, or of a norm."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
