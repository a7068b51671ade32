"""What an exported directory says of weights that a mechanism holds at zero, and the check of its pattern."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.mechanisms.weights.engine.patterns import exceeding_groups
from sparsecod_megatron.seams.mechanism import Mechanism, configured
from sparsecod_megatron.seams.plugin import StepContext

SPARSITY_FILE = "sparsity.json"


def write_sparsity(
    config: RunConfig, context: StepContext, folder: Path, *, removed: Mapping[str, tuple[int, int]] | None = None
) -> None:
    """Write `sparsity.json` beside the weights of a run whose mechanisms leave some out; else nothing.

    It has the settings of those mechanisms, the n:m pattern of the weights, and the share of live weights of every
    matrix in which one is zero.

    Args:
        config: of the run.
        context: the step that is exported.
        folder: complete but for this.
        removed: keys of `model:` whose number is smaller here than in the run, each with both.

    Raises:
        ConversionError: a matrix has more live weights in a group than its pattern allows.
    """
    table = ParameterTable.of(config)
    sparse = [mechanism for mechanism in configured(config) if mechanism.leaves_out(table)]
    if not sparse:
        return
    live: dict[str, float] = {}
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a handle of safetensors is not a mapping)
                weight = tensors.get_tensor(name)
                zeros = int((weight == 0).sum())
                if weight.dim() != 2 or not zeros:
                    continue
                live[name] = 1 - zeros / weight.numel()
                for mechanism, (n, m) in _patterns(sparse, name, context):
                    found.add(f"{n}:{m}")
                    if groups := exceeding_groups(weight, n, m):
                        raise ConversionError(
                            f"{folder.name}: {name} has {groups} groups of {m} with more than {n} live weights, where "
                            f"mechanisms.{mechanism.name} promises none; the checkpoint is not of this run"
                        )
    content: dict[str, Any] = {
        "mechanisms": {mechanism.name: dataclasses.asdict(mechanism) for mechanism in sparse},  # type: ignore[call-overload]
        "pattern": ", ".join(sorted(found)) or "unstructured",
        "live_share": live,
    }
    if removed:
        content["removed"] = removed
    (folder / SPARSITY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _patterns(
    sparse: Sequence[Mechanism], name: str, context: StepContext
) -> Iterator[tuple[Mechanism, tuple[int, int]]]:
    """What each mechanism promises of the layer that an exported tensor is in."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    for mechanism in sparse if layer else ():
        if layer and (pattern := mechanism.zero_pattern(int(layer[1]), context)) is not None:
            yield mechanism, pattern
