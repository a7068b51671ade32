"""How far each neuron's output is from a normal distribution, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.wasserstein import distance_to_normal
from sparsecod_megatron.hf.matrices import Matrix
from sparsecod_megatron.parallel.processes import Processes

MAX_NEURONS = 256
MAX_ROWS = 4096
MIN_ROWS = 64  # fewer rows say nothing of a distribution's shape
_KINDS_MEASURED = ("gate", "up", "gate_up")


class _Outputs:
    """Rows of a linear layer's output, at evenly spaced neurons."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._rows: list[Tensor] = []
        self._count = 0

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Keep what there is room for."""
        rows = output.reshape(-1, output.shape[-1])[: MAX_ROWS - self._count]
        chosen = torch.linspace(0, rows.shape[-1] - 1, min(MAX_NEURONS, rows.shape[-1]), device=rows.device).long()
        self._rows.append(rows[:, chosen].float())
        self._count += len(rows)

    def samples(self, processes: Processes) -> Tensor | None:
        """The first rows of all processes `[rows, neurons]`; None if too few. Collective over the processes."""
        rows = processes.gather([part.cpu() for part in self._rows])
        return torch.cat(rows)[:MAX_ROWS] if sum(map(len, rows)) >= MIN_ROWS else None


@torch.no_grad()
def normality_rows(context: Context, matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    """W₁ between neuron outputs (before the activation function) and the normal distribution.

    Measured on the half that thresholds are fitted on, for at most 256 evenly spaced neurons and 4,096 rows of each
    matrix. `wasserstein_normal` is what as many samples of a true normal distribution give: the floor of the estimate.
    Fused experts never form these outputs as a module's result and are left out, as is a listed expert with few rows.

    Args:
        context: the model and the sample.
        matrices: matrices of the model.
    """
    watched = [
        _Outputs(matrix) for matrix in matrices if matrix.kind in _KINDS_MEASURED and matrix.attribute == "weight"
    ]
    with ExitStack() as stack:
        for outputs in watched:
            handle = outputs.matrix.module.register_forward_hook(outputs)
            stack.callback(handle.remove)
        for tokens, _ in context.batches("fit", title="neuron outputs"):
            context.model(input_ids=tokens.to(context.device), use_cache=False)
    return [row for outputs in watched if (row := _row(outputs, context)) is not None]


def _row(outputs: _Outputs, context: Context) -> dict[str, Any] | None:
    samples = outputs.samples(context.processes)
    if samples is None:
        return None
    distances = distance_to_normal(samples)
    constant = distances.isnan()
    known = distances[~constant]
    floor = distance_to_normal(torch.randn(len(samples), 16, generator=context.generator())).mean()
    return {
        "layer": outputs.matrix.layer,
        "kind": outputs.matrix.kind,
        "name": outputs.matrix.name,
        "num_rows": len(samples),
        "num_neurons": samples.shape[1],
        "num_constant": int(constant.sum()),
        "wasserstein_mean": float(known.mean()) if len(known) else None,
        "wasserstein_p99": float(known.quantile(0.99)) if len(known) else None,
        "wasserstein_max": float(known.max()) if len(known) else None,
        "wasserstein_normal": float(floor),
    }
