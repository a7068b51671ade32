"""The layer-sequential engine: block by block, inputs are counted, matrices pruned, and what remains runs on.

At any time it holds the residual stream of the calibration sequences, and the statistics of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.allocate import angles, shares
from sparsecod_megatron.compression.experts import separate_experts
from sparsecod_megatron.compression.method import Material
from sparsecod_megatron.compression.patterns import Pattern
from sparsecod_megatron.compression.progress import DoneBlock, Outputs
from sparsecod_megatron.compression.reconstruct import squared_outputs
from sparsecod_megatron.compression.rules import Rule
from sparsecod_megatron.compression.scores import Evidence, gradient_norms
from sparsecod_megatron.compression.statistics import InputStatistics
from sparsecod_megatron.compression.watching import (
    Given,
    Slot,
    Watcher,
    slots_of,
    slots_of_parameter,
    stages_of,
)
from sparsecod_megatron.hf.blocks import Layers, find_layers
from sparsecod_megatron.hf.calls import Replay
from sparsecod_megatron.hf.residual_stream import ResidualStream


@dataclass(frozen=True)
class Plan:
    """How a rule is taken through a model.

    Attributes:
        rule: what is done to every matrix.
        inputs: `sparse`, matrices see the inputs that the pruned blocks before them make; `dense`, those of the dense
            model.
        order: `block`, all matrices of a block see the dense block; `true`, each sees those before it pruned.
        spread: how far blocks' shares may differ by their influence; None keeps them alike.
        output_error: whether the change of every matrix's outputs is measured, which needs Σ x·xᵀ.
        alpha: weight of GBLM's gradients.
        compat: GBLM's published scales.
        seed: seed of what is random.
    """

    rule: Rule
    inputs: str = "sparse"
    order: str = "block"
    spread: float | None = None
    output_error: bool = True
    alpha: float = 1.0
    compat: bool = False
    seed: int = 0


@dataclass
class Notes:
    """What happened on the way: keys of matrices pruned by pooled statistics, and of those that nothing reached."""

    pooled: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def warnings(self, instead: str) -> list[str]:
        """A sentence for each kind.

        Args:
            instead: what decided where nothing was reached.
        """
        found = []
        if self.pooled:
            found.append(
                f"{len(self.pooled)} matrices of experts had fewer inputs than a quarter of their width, and took the "
                f"inputs of all experts in their place; the first {self.pooled[0]}; more --samples would help"
            )
        if self.unreached:
            found.append(
                f"no calibration token reached {len(self.unreached)} matrices, so {instead} decided there; the first "
                f"{self.unreached[0]}"
            )
        return found


@torch.no_grad()
def prune_by_weights(material: Material, plan: Plan, taken: Sequence[str]) -> None:
    """Prune matrices by a rule that looks at weights alone, without running the model.

    Args:
        material: the model.
        plan: with a rule that needs no inputs.
        taken: names of parameters.
    """
    pruner = Pruner(material, plan)
    for name in material.residency.in_turn(taken):
        pruner.by_weights(name)


@torch.no_grad()
def prune_by_inputs(material: Material, plan: Plan, taken: Sequence[str]) -> Notes:
    """Prune the matrices of every block, one block after the other. Collective over the material's processes.

    Args:
        material: the model and its calibration sequences.
        plan: what to do.
        taken: names of parameters; those outside the blocks stay as they are.

    Raises:
        ConversionError: a model whose blocks cannot be run by themselves.
        ConfigError: more processes than sequences.
    """
    model, processes = material.model, material.processes
    assert material.sequences is not None
    layers = find_layers(model)
    gradients: dict[str, Tensor] = {}
    if plan.rule.needs_gradients:
        weights = {name: model.get_parameter(name) for name in taken}
        gradients = gradient_norms(model, material.sequences, weights, processes)
    patterns = _patterns(material, plan, layers, taken)
    stream = calibration_stream(material, layers)
    pruner = Pruner(material, plan, gradients)
    for layer in tqdm(range(len(layers)), desc="blocks", unit="block", disable=processes.no_progress):
        name = f"{layers.name}.{layer}"
        with material.residency.holding(name):
            has_advanced = pruner.by_inputs(name, layer, layers.blocks[layer], set(taken), stream, patterns[layer])
            if layer + 1 < len(layers) and not has_advanced:
                stream.advance(layer)
    return pruner.notes


@torch.no_grad()
def dense_statistics(material: Material, taken: Sequence[str], notes: Notes) -> Iterator[list[tuple[Slot, Tensor]]]:
    """The matrices of each block with what enters them in the dense model. Collective over the material's processes.

    Args:
        material: the model and its calibration sequences.
        taken: names of parameters of linear layers and fused experts; those outside the blocks are passed over.
        notes: is told where inputs were few or none.

    Yields:
        A block's matrices, each with Σ x·xᵀ, float32 `[in, in]`; the identity where nothing was seen.

    Raises:
        ConversionError: a model whose blocks cannot be run by themselves.
        ConfigError: more processes than sequences.
    """
    layers = find_layers(material.model)
    stream = calibration_stream(material, layers)
    no_progress = material.processes.no_progress
    for layer, block in enumerate(tqdm(layers.blocks, desc="blocks", unit="block", disable=no_progress)):
        with separate_experts(block):
            slots = slots_of(block, f"{layers.name}.{layer}", set(taken))
            watcher = Watcher(slots, gram=True)
            stream.advance(layer, watcher.watching)
        given, seen = Given(slots, watcher.totals(material.processes)), []
        for slot in slots:
            statistics, is_pooled = given.to(slot)
            if is_pooled:
                notes.pooled.append(slot.key)
            if statistics is None or not statistics.count:
                notes.unreached.append(slot.key)
                seen.append((slot, torch.eye(slot.weight.shape[1], device=slot.weight.device)))
            else:
                assert statistics.gram is not None
                seen.append((slot, statistics.gram))
        yield seen


def calibration_stream(material: Material, layers: Layers) -> ResidualStream:
    """The residual stream of this process's part of the sequences before the first of the model's blocks.

    Raises:
        ConversionError: a model whose blocks cannot be run by themselves.
        ConfigError: more processes than sequences.
    """
    own = material.part().split(material.batch_size)
    return ResidualStream(Replay(material.model, layers), material.residency, own)


def _turns(stream: ResidualStream, num_layers: int) -> Tensor:
    """Σ over tokens of the angle over π by which each dense block turns the stream, and the tokens: [L + 1]."""
    sums = torch.zeros(num_layers + 1, dtype=torch.float64)

    def see(layer: int, before: Tensor, after: Tensor) -> None:
        found = angles(before, after)
        sums[layer] += found.sum()
        sums[-1] += 0 if layer else found.numel()

    for layer in range(num_layers):
        stream.advance(layer, see=partial(see, layer))
    return sums


def _patterns(material: Material, plan: Plan, layers: Layers, taken: Sequence[str]) -> list[Pattern]:
    """The pattern of each block."""
    pattern = plan.rule.pattern
    if plan.spread is None:
        return [pattern] * len(layers)
    sums = material.processes.total(_turns(calibration_stream(material, layers), len(layers)))
    sizes = [
        sum(material.model.get_parameter(name).numel() for name in taken if name.startswith(f"{layers.name}.{layer}."))
        for layer in range(len(layers))
    ]
    allocated = shares(pattern.sparsity, (sums[:-1] / sums[-1]).tolist(), sizes, plan.spread)
    return [pattern.with_share(share) for share in allocated]


class Pruner:
    """Prunes matrices.

    Args:
        material: the model and its calibration sequences.
        plan: what to do.
        gradients: `Evidence.gradients` of each parameter, where the rule needs them.

    Attributes:
        notes: what became of them.
    """

    def __init__(self, material: Material, plan: Plan, gradients: Mapping[str, Tensor] | None = None) -> None:
        self._material, self._plan, self._gradients = material, plan, gradients or {}
        self.notes = Notes()

    def by_weights(self, name: str) -> None:
        """Prune the matrices of a parameter, in place."""
        for slot in slots_of_parameter(self._material.model, name):
            self.write(slot, *self.pruned(slot, None, self._plan.rule.pattern))

    def by_inputs(
        self, name: str, layer: int, block: nn.Module, taken: set[str], stream: ResidualStream, pattern: Pattern
    ) -> bool:
        """Prune the matrices of a block, in place, or take them from an earlier run.

        Returns:
            Whether the stream stands behind the block already, because the next one is to see what the dense block
            leaves.
        """
        processes, progress, is_dense = self._material.processes, self._material.progress, self._plan.inputs == "dense"
        is_done = processes.from_first(partial(progress.has, layer))
        if is_done and is_dense:
            stream.advance(layer)
        with separate_experts(block):
            slots = slots_of(block, name, taken)
            if is_done:
                self.put(slots, progress.load(layer))
            elif slots:
                done = self._block(layer, slots, stream, pattern)
                if processes.is_first:
                    progress.save(layer, done)
        return is_dense and (is_done or bool(slots))

    def _block(self, layer: int, slots: list[Slot], stream: ResidualStream, pattern: Pattern) -> DoneBlock:
        """What became of the matrices of a block that nobody has pruned yet."""
        done, size = DoneBlock({}, [], []), self._material.processes.size
        found = self._watch(layer, slots, stream)
        stages = [slots] if self._plan.order == "block" else stages_of(slots, found)
        for number, stage in enumerate(stages):
            given = Given(slots, self._watch(layer, stage, stream) if number else found)
            # One matrix for each process at a time, so that a second block's worth of weights never comes together,
            # and the products of inputs go as soon as their last matrix is done.
            for start in range(0, len(stage), size):
                self._part(stage[start : start + size], given, pattern, done)
                given.keep_for(stage[start + size :])
        self.notes.pooled += done.pooled
        self.notes.unreached += done.unreached
        return done

    def _part(self, part: Sequence[Slot], given: Given, pattern: Pattern, done: DoneBlock) -> None:
        """Prune matrices, one on each process, and put them in their places. Collective."""
        processes = self._material.processes
        known = {slot.key: self._statistics(slot, given, done) for slot in part}

        def work(own: Sequence[Slot]) -> list[tuple[Tensor, Outputs]]:
            made = [self.pruned(slot, known[slot.key], pattern) for slot in own]
            return made if processes.size == 1 else [(weight.cpu(), outputs) for weight, outputs in made]

        made = dict(zip([slot.key for slot in part], processes.distribute(part, work), strict=True))
        self.put(part, DoneBlock(made, [], []))
        done.matrices.update({slot.key: (slot.weight, made[slot.key][1]) for slot in part})

    def put(self, slots: Sequence[Slot], done: DoneBlock) -> None:
        """Put a block's new weights where the old ones were."""
        for slot in slots:
            weight, outputs = done.matrices[slot.key]
            self.write(slot, weight.to(slot.weight.device), outputs)
        self.notes.pooled += done.pooled
        self.notes.unreached += done.unreached

    def _watch(self, layer: int, slots: list[Slot], stream: ResidualStream) -> dict[str, InputStatistics]:
        watcher = Watcher(slots, gram=self._needs_gram)
        go = stream.advance if self._plan.inputs == "dense" else stream.run
        go(layer, watcher.watching)
        return watcher.totals(self._material.processes)

    @property
    def _needs_gram(self) -> bool:
        return self._plan.rule.needs_gram or self._plan.output_error

    def _statistics(self, slot: Slot, given: Given, done: DoneBlock) -> InputStatistics:
        statistics, is_pooled = given.to(slot)
        if is_pooled:
            done.pooled.append(slot.key)
        if statistics is None or not statistics.count:
            done.unreached.append(slot.key)
        if statistics is None:  # magnitude decides
            width, device = slot.weight.shape[1], slot.weight.device
            statistics = InputStatistics.empty(width, gram=self._needs_gram, device=device)
        return statistics

    def pruned(self, slot: Slot, statistics: InputStatistics | None, pattern: Pattern) -> tuple[Tensor, Outputs]:
        """New weights `[out, in]` in the parameter's type, and squared norms of the outputs' change and the outputs."""
        plan, weight = self._plan, slot.weight.float()
        evidence = Evidence(
            name=slot.key,
            weight=weight,
            statistics=statistics,
            gradients=self._gradient(slot),
            num_sequences=0 if self._material.sequences is None else len(self._material.sequences),
            damping=plan.rule.options.damping,
            alpha=plan.alpha,
            compat=plan.compat,
            seed=plan.seed,
        )
        new = plan.rule.prune(evidence, pattern).to(slot.weight.dtype)
        if statistics is None or statistics.gram is None or not statistics.count:
            return new, None
        return new, squared_outputs(new, weight, statistics.gram)

    def write(self, slot: Slot, weight: Tensor, outputs: Outputs) -> None:
        """Put new weights where the old ones were."""
        self._material.changes.put_piece(slot.name, slot.weight, weight, outputs)

    def _gradient(self, slot: Slot) -> Tensor | None:
        if not self._gradients:
            return None
        gradient = self._gradients[slot.name]
        if slot.expert is not None:
            return gradient[slot.expert]
        return gradient.T if isinstance(slot.module, Conv1D) else gradient
