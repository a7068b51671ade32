"""A model without the neurons and heads that add nothing: of smaller widths, the same function.

A neuron whose column in its MLP's output matrix is zero adds nothing to the residual stream, nor does a key head, with
the query heads that read it, where the columns that take their outputs are zero. HuggingFace classes have one width for
all MLPs, one for all experts and one number of heads, so each becomes the largest number that lives in any of them;
where fewer live, as many dead ones stay, as the zeros that they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.hf.expert_modules import FUSED_MULTIPLE
from sparsecod_megatron.hf.families import choose_family

WIDTHS = {
    "mlp_output": "ffn_hidden_size",
    "expert_output": "moe_ffn_hidden_size",
    "shared_expert_output": "moe_shared_expert_intermediate_size",
    "attention_output": "num_query_groups",
}
"""Row of the table of parameters → the key that says how many groups its columns have."""
PATTERNS = {"neuron": ("mlp_output", "expert_output", "shared_expert_output"), "head": ("attention_output",)}
"""Sort of group → the rows whose columns show which of them live."""
EXITS = {"linear_fc1": "linear_fc2", "linear_qkv": "linear_proj"}
"""Linear layer whose rows are groups → the one whose columns are."""


@dataclass(frozen=True)
class Narrowed:
    """A model with smaller widths.

    Attributes:
        model: its configuration.
        tensors: under the same names, cut when they are asked for.
        removed: by key of `model`, the number before and after.
        zeros: dead groups that stay.
        obstacle: why nothing is removed although something could be; empty if not so.
    """

    model: ModelConfig
    tensors: Mapping[str, Tensor]
    removed: dict[str, tuple[int, int]]
    zeros: int
    obstacle: str = ""

    def described(self) -> str:
        """One line."""
        changes = ", ".join(f"model.{key} {before} → {after}" for key, (before, after) in self.removed.items())
        stay = f"; {self.zeros} dead ones stay as zeros" if self.zeros else ""
        return f"dead groups removed: {changes or self.obstacle or 'none, in some layer all live'}{stay}"


def without_dead_groups(model: ModelConfig, tensors: Mapping[str, Tensor], patterns: Collection[str]) -> Narrowed:
    """Leave out what adds nothing, as far as one number for all layers allows. Reads each output matrix once more.

    Args:
        model: our configuration.
        tensors: every parameter under its name in a single-process GPTModel of the local spec; no other tensor may
            have an axis of the widths that change.
        patterns: of `PATTERNS`.

    Returns:
        The model; the arguments themselves where every group of some layer lives, and where only the `sparsecod` class
        would have the smaller widths, which a stock class has as they are.
    """
    table = ParameterTable(model)
    rows = {name for pattern in patterns for name in PATTERNS[pattern]}
    live: dict[str, Tensor] = {}
    largest: dict[str, int] = {}
    for name in tensors:
        if (kind := _row(table, name)) is not None and kind.name in rows and name.endswith(".weight"):
            columns = (tensors[name] != 0).any(0).view(_count(kind, model), -1)
            live[name] = columns.any(1)
            key = WIDTHS[kind.name]
            largest[key] = max(largest.get(key, 1), int(live[name].sum()))
    if "moe_ffn_hidden_size" in largest:  # what fused experts can multiply
        needed = -(-largest["moe_ffn_hidden_size"] // FUSED_MULTIPLE) * FUSED_MULTIPLE
        largest["moe_ffn_hidden_size"] = min(needed, model.expert_ffn_hidden_size)
    narrow, obstacle = replace(model, **_fields(model, largest)), ""
    if choose_family(narrow).code and not (stock := choose_family(model)).code:
        widths = ", ".join(f"{key}={count}" for key, count in largest.items())
        narrow, obstacle = model, f"none, because {stock.architecture} cannot have {widths}"
    kept, zeros = {}, 0
    for name, lives in live.items():
        kind = table.find(name)
        count = _count(kind, narrow)
        # Live ones first, then the first of the dead, in the order of the model.
        kept[name] = lives.int().argsort(descending=True, stable=True)[:count].sort().values
        zeros += count - int(lives.sum())
    before = {WIDTHS[table.find(name).name]: _count(table.find(name), model) for name in live}
    removed = {key: (old, getattr(narrow, key)) for key, old in before.items() if old != getattr(narrow, key)}
    return Narrowed(narrow, _Cut(tensors, kept, table) if removed else tensors, removed, zeros, obstacle)


class _Cut(Mapping[str, Tensor]):
    """Tensors of whose rows or columns the kept groups' alone are there."""

    def __init__(self, stored: Mapping[str, Tensor], kept: Mapping[str, Tensor], table: ParameterTable) -> None:
        self._stored, self._kept, self._table = stored, kept, table

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        found = re.fullmatch(r"(.*\.)(linear_fc1|linear_fc2|linear_qkv|linear_proj)\.(weight|bias)", name)
        if found is not None and found[2] not in EXITS and found[3] == "bias":
            return tensor  # of the stream's channels
        exit_name = f"{found[1]}{EXITS.get(found[2], found[2])}.weight" if found else ""
        if found is None or exit_name not in self._kept:
            return tensor
        kept, count = self._kept[exit_name], _count(self._table.find(exit_name), self._table.model)
        axis = 0 if found[2] in EXITS else 1
        stacked = 1 if axis else self._table.find(name).stacked
        groups = tensor.unflatten(axis, (stacked, count, -1))
        return groups.index_select(axis + 1, kept.to(tensor.device)).flatten(axis, axis + 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _row(table: ParameterTable, name: str) -> ParameterKind | None:
    try:
        return table.find(name)
    except LookupError:  # a buffer
        return None


def _count(kind: ParameterKind, model: ModelConfig) -> int:
    """Groups of an output matrix of this kind."""
    return {
        "mlp_output": model.ffn_hidden_size,
        "expert_output": model.expert_ffn_hidden_size,
        "shared_expert_output": model.moe_shared_expert_intermediate_size or 0,
        "attention_output": model.query_groups,
    }[kind.name]


def _fields(model: ModelConfig, largest: Mapping[str, int]) -> dict[str, Any]:
    """Keys of a model with these numbers of groups; heads keep their size and their number for each key head."""
    fields: dict[str, Any] = dict(largest)
    if groups := largest.get("num_query_groups"):
        fields["num_attention_heads"] = groups * (model.num_attention_heads // model.query_groups)
        fields["kv_channels"] = model.head_dim
    return fields
