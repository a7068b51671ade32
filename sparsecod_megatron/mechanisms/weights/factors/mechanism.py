"""Matrices that are computed from smaller parameters: what mechanisms share whose weight W is a function of factors.

The factors are the parameters. Megatron-Core reduces, steps, decays and saves them as any other, so gradient norm,
clipping, distributed optimizer and checkpoints need nothing of their own, and gradients and optimizer state are as
small as the factors are. In every forward pass a linear layer computes its part of W from its factors, multiplies by it
as ever, and lets go of it; the backward pass computes it once more (Megatron-Core's `CheckpointWithoutOutput`). So the
products cost what a dense layer's do, and a micro-batch costs the factors' own on top, which do not grow with tokens.

Under tensor parallelism a factor is cut with the rows or columns of W, or every rank holds it whole; then each rank has
the gradient from its part of W, and they are summed in the backward pass. Weight gradients are not fused into
`main_grad`: W is not a parameter and has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import choices_of
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.settings import KINDS, WeightMechanism, qkv_problems
from sparsecod_megatron.mechanisms.weights.factors.computed_linear import computed_linears, computing
from sparsecod_megatron.mechanisms.weights.factors.factors import PLACES, Factor, random_places
from sparsecod_megatron.seams.mechanism import Folds, LayerSite, Mechanism

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

BRANCHES = {"qkv": "qkv", "attention_output": "attention_output"} | {
    f"{family}_{end}": f"mlp_{end}" for family in ("mlp", "expert", "shared_expert") for end in ("input", "output")
}
"""Matrices that can have factors: row of the table of parameters → its kind."""


@dataclass
class Factored(Mechanism):
    """What the mechanisms share; a subclass says which factors there are and how W is computed from them.

    Attributes:
        sparse: names of factors that are sparse.
        keeps_matrix: whether the matrix's own parameter stays, as `weight` among the parts.
    """

    shapes_weights: ClassVar[bool] = True
    sparse: ClassVar[tuple[str, ...]] = ()
    keeps_matrix: ClassVar[bool] = False

    kinds: list[str] = choices_of(*KINDS, among=KINDS)
    """Which matrices have factors."""

    def factors(self, kind: ParameterKind) -> tuple[Factor, ...]:
        """What a matrix is computed from; the first that is split comes with it under every layout."""
        raise NotImplementedError

    def composed(self, kind: ParameterKind, parts: Mapping[str, Tensor]) -> Tensor:
        """A rank's part of the matrix, [out, in], from its parts of factors and places, by name."""
        raise NotImplementedError

    def part_of_rank(self, kind: ParameterKind, factor: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank's part of the matrix takes of a factor that every rank holds whole.

        Args:
            kind: the matrix.
            factor: whole.
            rank: of those that share the matrix.
            ranks: their number.
        """
        return factor

    def drawn(self, kind: ParameterKind, factor: Factor, std: float, generator: torch.Generator) -> Tensor:
        """Fresh numbers of a whole factor, fp32 on the generator's device.

        Args:
            kind: the matrix.
            factor: of it.
            std: that a plain matrix would be drawn with.
            generator: seeded by the factor's name.
        """
        raise NotImplementedError

    def size_problems(self, kind: ParameterKind, ranks: int) -> Iterator[str]:
        """Why a matrix cannot have these factors, in one line each.

        Args:
            kind: the matrix.
            ranks: over which it is split.
        """
        yield from ()

    def reason_against(self, other: Mechanism) -> str | None:
        """Why another mechanism may not have the same matrices, to stand behind its name; None: it may."""
        if isinstance(other, WeightMechanism):
            return ", which masks weights by their values (RigL by gradients too), and these are not stored"
        return ""

    def has_factors(self, kind: ParameterKind) -> bool:
        """Whether a row of the plain table is computed from factors."""
        return BRANCHES.get(kind.name) in self.kinds

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What steps, scales or multiplies whole matrices, and other mechanisms of the same matrices."""
        name, parallel, model = f"mechanisms.{self.name}", config.parallel, config.model
        if not self.kinds:
            yield f"{self.key('kinds')}: names none; name at least one of {', '.join(KINDS)}, or remove the mechanism"
        yield from qkv_problems(self, self.kinds, model)
        if config.optimizer.optimizer == "muon":
            yield f"optimizer.optimizer: muon orthogonalises whole matrices, not the factors of {name}; use adam"
        if config.precision.fp8:
            yield f"precision.fp8_recipe: {config.precision.fp8_recipe}, but {name} multiplies in bf16; remove it"
        if model.mup_base_hidden_size is not None:
            yield f"model.mup_base_hidden_size: muP has no learning rate for the factors of {name}; remove one of them"
        for field in ("moe_grouped_gemm", "moe_shared_expert_overlap", "delay_wgrad_compute"):
            if config.megatron.get(field):
                yield f"megatron.{field}: true, but {name} computes its weights in the layers' own pass; remove it"
        if model.is_moe and parallel.expert_tensor_size not in (1, parallel.tensor_model_parallel_size):
            key, size = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_size
            yield f"{key}: {size}, but {name} needs 1 or tensor_model_parallel_size; set it to one of them"
        for other in config.mechanisms.values():
            same, why = self._shared_kinds(other, model), self.reason_against(other)
            if other is not self and same and why is not None:
                what = f"{same[0]} has mechanisms.{other.name} too{why}"
                yield f"{self.key('kinds')}: {what}; name each kind in one of them"
        rows = {kind.name: kind for layer in range(model.num_layers) for kind in self._plain(model, layer)}
        for kind in rows.values():
            ranks = parallel.expert_tensor_size if kind.split == "expert" else parallel.tensor_model_parallel_size
            yield from self.size_problems(kind, ranks)

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """A row for each factor; the first that is split multiplies for the matrix, unless that stays."""
        if not self.has_factors(kind):
            return (kind,)
        factors = self.factors(kind)
        first = None if self.keeps_matrix else next(factor for factor in factors if factor.dimension is not None)
        rows = tuple(
            dataclasses.replace(
                kind,
                name=f"{kind.name}_{factor.name}",
                shape=factor.shape,
                pattern=kind.pattern.replace(r"\.weight", rf"\.{factor.name}"),
                split="none" if factor.dimension is None and kind.split == "tensor" else kind.split,
                dimension=factor.dimension,
                stacked=kind.stacked if factor.dimension == 0 else 1,
                fp8=False,
                products=math.prod(kind.shape) if factor is first else 0,
            )
            for factor in factors
        )
        return (kind, *rows) if self.keeps_matrix else rows

    def weight_bytes(self, kind: ParameterKind, value_bytes: int) -> int:
        """The places of a sparse factor's numbers."""
        matrices = [row for row, of in BRANCHES.items() if of in self.kinds]
        return 4 if kind.name in {f"{row}_{name}" for row in matrices for name in self.sparse} else 0

    def transformer_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Experts one by one: a grouped product takes parameters."""
        return {"moe_grouped_gemm": False} if model.is_moe else {}

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """Linear layers that compute their weights."""
        kinds = {kind.name: kind for kind in self._plain(site.model, site.layer)}

        def replaced(submodules: Any, **places: str) -> Any:
            changed = {place: kinds[name] for place, name in places.items() if name in kinds}
            linears = {
                place: computing(getattr(submodules, place), mechanism=self, model=site.model, matrix=kind)
                for place, kind in changed.items()
            }
            return dataclasses.replace(submodules, **linears)

        layer = spec.submodules
        attention = layer.self_attention
        attention.submodules = replaced(attention.submodules, linear_qkv="qkv", linear_proj="attention_output")
        mlps = {"mlp": layer.mlp}
        if site.model.is_moe_layer(site.layer):
            experts = layer.mlp.submodules
            mlps = {"expert": experts.experts, "shared_expert": experts.shared_experts}
        for family, mlp in mlps.items():
            if mlp is not None:
                places = {"linear_fc1": f"{family}_input", "linear_fc2": f"{family}_output"}
                mlp.submodules = replaced(mlp.submodules, **places)
        return spec

    @torch.no_grad()
    def initialize(self, chunk: GPTModel, shards: Mapping[Any, Any], seed: int) -> None:
        """Draw factors, and the places of sparse ones, by their names."""
        from sparsecod_megatron.model.init import standard_deviation
        from sparsecod_megatron.model.matrices import named_generator

        for linear in computed_linears(chunk, self):
            for factor in linear.factors:
                parameter = getattr(linear, factor.name)
                if parameter not in shards:
                    continue
                shard = shards[parameter]
                matrix = dataclasses.replace(shard.matrix, row=linear.matrix)
                std = standard_deviation(linear.model, matrix)
                generator = named_generator(f"{seed} {shard.matrix.name}", parameter.device)
                parameter.copy_(shard.cut(self.drawn(linear.matrix, factor, std, generator)))
                if factor.axis is not None:
                    getattr(linear, factor.name + PLACES).copy_(shard.cut(random_places(factor, generator)))

    def plain_tensors(self, model: ModelConfig, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Matrices, computed when they are asked for."""
        return PlainTensors(self, model, stored)

    def make_plain(self, model: GPTModel) -> None:
        """Matrices as parameters."""
        for linear in computed_linears(model, self):
            linear.make_plain()

    def export(self, model: ModelConfig) -> Folds:
        """The matrices that the factors make."""
        return Folds()

    def _shared_kinds(self, other: Mechanism, model: ModelConfig) -> list[str]:
        """Kinds of matrices that another mechanism has too."""
        if isinstance(other, WeightMechanism):
            rows = ((kind, layer) for layer in range(model.num_layers) for kind in self._plain(model, layer))
            return [BRANCHES[kind.name] for kind, layer in rows if other.has_mask(kind, layer)]
        return [kind for kind in self.kinds if kind in getattr(other, "kinds", ())]

    def _plain(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Rows of the matrices that have factors."""
        return (kind for kind in ParameterTable(model).plain_layer(layer) if self.has_factors(kind))


class PlainTensors(Mapping[str, Tensor]):
    """Tensors by name, with the matrices of a mechanism in place of their factors, computed when they are asked for.

    Args:
        mechanism: of the run.
        model: of the run.
        stored: tensors under their names in a single-process GPTModel.
    """

    def __init__(self, mechanism: Factored, model: ModelConfig, stored: Mapping[str, Tensor]) -> None:
        self._mechanism, self._table, self._stored = mechanism, ParameterTable(model), stored

    def __getitem__(self, name: str) -> Tensor:
        """On the stored tensors' device, in their type; matrices in fp32, as the reference of an export has them."""
        if (parts := self._parts.get(name)) is None:
            return self._stored[name]
        tensors = {part: self._stored[stored] for part, stored in parts.items()}
        tensors = {part: tensor if part.endswith(PLACES) else tensor.float() for part, tensor in tensors.items()}
        return self._mechanism.composed(self._table.find(name), tensors)

    def __iter__(self) -> Iterator[str]:
        parts = {stored for names in self._parts.values() for stored in names.values()}
        return iter([*(name for name in self._stored if name not in parts), *self._parts])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """Name of each matrix → its parts, each with the name that it is stored under."""
        found: dict[str, dict[str, str]] = {}
        for name in self._stored:
            layer, _, part = name.rpartition(".")
            matrix = f"{layer}.weight"
            if self._has_part(matrix, part):
                kept = {"weight": matrix} if self._mechanism.keeps_matrix else {}
                found.setdefault(matrix, kept)[part] = name
        return found

    def _has_part(self, matrix: str, part: str) -> bool:
        try:
            kind = self._table.find(matrix)
        except LookupError:
            return False
        names = {factor.name for factor in self._mechanism.factors(kind)} if self._mechanism.has_factors(kind) else ()
        return part.removesuffix(PLACES) in names
