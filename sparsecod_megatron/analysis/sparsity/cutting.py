"""Passes in which feed-forward neurons are captured, counted, or cut below thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_megatron.analysis.scores.context import Context, joined
from sparsecod_megatron.analysis.sparsity.cett import NeuronSample
from sparsecod_megatron.analysis.sparsity.neurons import NeuronSite, Observer
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.calls import sequence_losses
from sparsecod_megatron.parallel.processes import Processes

MAX_ROWS = 2048


class Capture:
    """Keeps the first rows that pass through a site.

    Args:
        site: the feed-forward network.
        max_rows: kept at most.
    """

    def __init__(self, site: NeuronSite, max_rows: int = MAX_ROWS) -> None:
        self._site = site
        self._max_rows = max_rows
        self._activations: list[Tensor] = []
        self._experts: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._room = 0

    def activations(self, activations: Tensor, norms: Tensor, tokens: Tensor | None, expert: int) -> Tensor:
        """Keep what there is room for."""
        self._room = min(len(activations), self._max_rows - sum(map(len, self._activations)))
        self._activations.append(activations[: self._room].clone())
        self._experts.append(torch.full((self._room,), expert))
        return activations

    def output(self, output: Tensor) -> None:
        """Keep the norms of the same rows' outputs."""
        self._norms.append(torch.linalg.vector_norm(output[: self._room].float(), dim=-1))

    def sample(self, processes: Processes) -> NeuronSample | None:
        """The first rows of all processes; None where no row came by. Collective over the processes."""
        kept = [part for part in zip(self._activations, self._norms, self._experts, strict=True) if len(part[0])]
        rows = processes.gather([tuple(column.cpu() for column in part) for part in kept])
        if not rows:
            return None
        device = self._site.down(0).device
        activations, norms, experts = (column[: self._max_rows].to(device) for column in joined(rows))
        return NeuronSample(activations, experts, norms, self._site)


class Cut:
    """Cuts neurons with ‖n_i‖ <= ε and counts, for each sequence, the neurons cut, exactly zero, and seen.

    Args:
        epsilon: threshold; a negative one cuts nothing.
        seq_length: tokens of a sequence.
        num_sequences: sequences of this process's whole pass.
    """

    def __init__(self, epsilon: float, seq_length: int, num_sequences: int) -> None:
        self._epsilon = epsilon
        self._seq_length = seq_length
        self.counts = torch.zeros(num_sequences, 3, dtype=torch.int64)
        self.first_sequence = 0
        self.num_tokens = 0  # of the micro-batch that passes

    def activations(self, activations: Tensor, norms: Tensor, tokens: Tensor | None, expert: int) -> Tensor:
        """Cut and count.

        Raises:
            ConversionError: rows that are not the sample's tokens.
        """
        if tokens is None and len(activations) > self.num_tokens:
            raise ConversionError(
                f"a feed-forward network sees {len(activations)} rows for {self.num_tokens} tokens (a prompt of the "
                "model's own, or several streams), so neurons cannot be counted by token; leave activation out of "
                "--scores"
            )
        tokens = torch.arange(len(activations), device=activations.device) if tokens is None else tokens
        sequences = (self.first_sequence + tokens // self._seq_length).cpu()
        small = norms <= self._epsilon
        row = torch.stack([small.sum(-1), (activations == 0).sum(-1)], -1).cpu()
        full = torch.full((len(row), 1), activations.shape[-1], dtype=torch.int64)
        self.counts.index_add_(0, sequences, torch.cat([row, full], -1))
        return activations.masked_fill(small, 0)

    def output(self, output: Tensor) -> None:
        """Ignored: the output teaches nothing here."""


class CutPass(NamedTuple):
    """What a pass with thresholds found.

    Attributes:
        epsilons: threshold of each site.
        losses: mean loss of each sequence `[sequences]`.
        counts: neurons cut, exactly zero, and seen: `[sites, sequences, 3]`.
    """

    epsilons: Sequence[float]
    losses: Tensor
    counts: Tensor


@torch.no_grad()
def run_cut(context: Context, sites: Sequence[NeuronSite], epsilons: Sequence[float]) -> CutPass:
    """Run the held-out sequences with the small neurons of every site cut.

    Args:
        context: the model and the sample.
        sites: sites of the model.
        epsilons: one threshold a site.
    """
    num_sequences = len(context.own("held_out"))
    cuts = [Cut(epsilon, context.seq_length, num_sequences) for epsilon in epsilons]
    losses: list[Tensor] = []
    done = 0
    with _observing(sites, cuts):
        for tokens, labels in _batches(context, sites):
            for cut in cuts:
                cut.first_sequence, cut.num_tokens = done, tokens.numel()
            tokens, labels = tokens.to(context.device), labels.to(context.device)
            losses.append(sequence_losses(context.model(input_ids=tokens, use_cache=False).logits, labels))
            done += len(tokens)
    counts = torch.stack([cut.counts for cut in cuts])
    processes = context.processes
    return CutPass(epsilons, torch.cat(processes.gather(losses)), torch.cat(processes.gather([counts]), dim=1))


@torch.no_grad()
def capture(context: Context, sites: Sequence[NeuronSite], max_rows: int = MAX_ROWS) -> list[NeuronSample | None]:
    """Rows of every site from the sequences to fit on.

    Args:
        context: the model and the sample.
        sites: sites of the model.
        max_rows: kept for each site.
    """
    captures = [Capture(site, max_rows) for site in sites]
    with _observing(sites, captures, check=True):
        for tokens, _ in context.batches("fit", title="neurons"):
            context.model(input_ids=tokens.to(context.device), use_cache=False)
    return [found.sample(context.processes) for found in captures]


@contextmanager
def _observing(sites: Sequence[NeuronSite], observers: Sequence[Observer], *, check: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        for site, observer in zip(sites, observers, strict=True):
            stack.enter_context(site.observed(observer, check=check))
        yield


def _batches(context: Context, sites: Sequence[NeuronSite]) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out micro-batches; single sequences where a site cannot tell whose rows it sees."""
    step = None if all(site.rows_have_known_tokens for site in sites) else 1
    for tokens, labels in context.batches("held_out", title="cut neurons"):
        yield from zip(tokens.split(step or len(tokens)), labels.split(step or len(tokens)), strict=True)
