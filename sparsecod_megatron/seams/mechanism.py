"""What a mechanism is to the rest of the system: a dataclass of its settings whose methods say all that follows.

`config`, `model`, `train`, `planning`, `hf` and `checkpoint` never name a mechanism: they ask the objects that stand in
`RunConfig.mechanisms`. Every method has a neutral default, so that a small mechanism stays small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import DataConfig, ModelConfig, RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import Tensor

    from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts
    from sparsecod_megatron.seams.residual import ResidualPath


@dataclass(frozen=True)
class LayerSite:
    """Where a layer is built.

    Attributes:
        model: our configuration of it.
        megatron: Megatron-Core's.
        provider: the modules of the backend.
        layer: from 0.
    """

    model: ModelConfig
    megatron: TransformerConfig
    provider: BackendSpecProvider
    layer: int


@dataclass(frozen=True)
class RankShape:
    """What one rank's modules see of a micro-batch, for planning.

    Attributes:
        tokens: that its dense matrix products see.
        stream_tokens: that its norms and residual stream see: fewer with sequence parallelism.
        expert_rows: that all its routed experts of the layer get, if the load is even.
        tensor: tensor-parallel size.
        expert_tensor: tensor-parallel size of the experts.
        context: context-parallel size.
        seq_length: tokens of a whole sequence.
        value_bytes: of an activation.
        norm_bytes: what a norm of the residual stream keeps of one token.
        is_reference: whether modules are plain PyTorch's, and not Transformer Engine's.
    """

    tokens: int
    stream_tokens: int
    expert_rows: int
    tensor: int
    expert_tensor: int
    context: int
    seq_length: int
    value_bytes: int
    norm_bytes: int
    is_reference: bool = False

    @property
    def copy_bytes(self) -> int:
        """What a value's copy in fp32 takes; nothing where it is fp32 itself."""
        return 0 if self.value_bytes == 4 else 4


@dataclass(frozen=True)
class ResidualState:
    """What a token's residual state is between layers.

    Attributes:
        columns: vectors of `hidden_size` numbers.
        in_fp32: whether they are fp32 whatever the model computes in.
    """

    columns: int = 1
    in_fp32: bool = False


@dataclass(frozen=True)
class Folds:
    """Export: the stored weights are all there is, so every HuggingFace class can hold them."""


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor of the mechanism's own, the same in a GPTModel and in the files.

    Attributes:
        megatron: name in a single-process GPTModel.
        hf: name in the files.
        shape: of both.
        is_integer: whether it holds integers (int32), which keep their type in files.
    """

    megatron: str
    hf: str
    shape: tuple[int, ...]
    is_integer: bool = False


@dataclass(frozen=True)
class Module:
    """Export: the `sparsecod` architecture, extended by a file of code.

    Attributes:
        code: a file that imports torch and the standard library alone, with a function `extend(layer, settings, config,
            index)` that changes a `SparsecodLayer` as it is built; copied into the directory.
        beside: other such files, from which it takes something.
        settings: what `extend` and an import get, as plain data; an import takes them for the section of YAML.
        tensors: of all layers.
        replaced: tensors of the plain model that it has not, by their names in a GPTModel.
    """

    code: Path
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[ExportedTensor, ...] = ()
    replaced: frozenset[str] = frozenset()
    beside: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Export: no HuggingFace class can compute it.

    Attributes:
        reason: why, and what to do, for the message.
    """

    reason: str


class Mechanism:
    """One entry of the `mechanisms:` section; a subclass is a dataclass whose fields are its settings, with bounds.

    Its module imports torch at most: Megatron-Core is there only after a backend has been chosen, so methods that need
    it import it.

    Attributes:
        name: in YAML.
        shapes_weights: whether weights that were trained with it mean another function without it, or the other way
            round, so that `checkpoint.init_from` refuses to switch it.
        adds_modules: modules and parameters inside a layer, by attribute, that hold all its weights, beside which the
            others, as these are drawn, mean what they mean without it: `checkpoint.init_from` a model without it leaves
            its own as they are drawn.
        weights_need_state: whether weights that were trained with it train otherwise without the state that its plugin
            keeps in a checkpoint, so that `checkpoint.init_from` takes both or is refused.
        unfused: branches (`attention`, `mlp`) whose normalised input it reads, so that no kernel may fuse the norm into
            what follows.
        shares_layers: whether it means the same in layers that share their parameters (`owner`).
        has_choices: whether rounding may decide what a token passes through, where two values nearly tie.
        mixes_tokens: whether a layer takes from other tokens outside of attention, which Jacobians cannot hold fixed.
    """

    name: ClassVar[str]
    shapes_weights: ClassVar[bool] = False
    adds_modules: ClassVar[tuple[str, ...]] = ()
    weights_need_state: ClassVar[bool] = True
    unfused: ClassVar[tuple[str, ...]] = ()
    shares_layers: ClassVar[bool] = False
    has_choices: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False

    def problems(self, config: RunConfig) -> Iterator[str]:
        """One line for each reason why the run cannot have it: key, value, what to do. Bounds are already checked."""
        yield from ()

    def parameters(self, model: ModelConfig, layer: int) -> Iterator[ParameterKind]:
        """Parameters that it adds to layer `layer` (from 0)."""
        yield from ()

    def end_parameters(self, model: ModelConfig) -> tuple[list[ParameterKind], list[ParameterKind]]:
        """Parameters that it adds before the layers, and behind them."""
        return [], []

    def owner(self, model: ModelConfig, layer: int) -> int:
        """The layer (from 0) whose parameters layer `layer` computes with: itself, or an earlier one of its stage."""
        return layer

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """The parameters that layer `layer` (from 0) has in place of a plain one: that itself, unless others do."""
        return (kind,)

    def stepped(self, kind: ParameterKind, model: ModelConfig, layer: int | None) -> ParameterKind:
        """A parameter with its factors on learning rate, weight decay and Adam's ε.

        Args:
            kind: any mechanism's, too.
            model: of the run.
            layer: from 0; None at the ends of the model.
        """
        return kind

    def initialize(self, chunk: GPTModel, shards: Mapping[Any, Any], seed: int) -> None:
        """Give what it has in a model chunk, parameters and buffers, fresh values that no row of the table says. Local.

        Args:
            chunk: without wrappers; its matrices have been drawn by their rows.
            shards: its matrices (`model.matrices.Shard`) by parameter; none of what has no memory here.
            seed: of the run.
        """

    def read_data(self, models: Sequence[GPTModel], data: DataConfig) -> None:
        """Take what it needs of the run's data into fresh models, whose checkpoints keep it. Local.

        Args:
            models: the GPTModel chunks of this rank, without wrappers.
            data: the run's.
        """

    def dead_parameters(self, table: ParameterTable) -> int:
        """Number of parameters that it holds at zero."""
        return 0

    def leaves_out(self, table: ParameterTable) -> bool:
        """Whether weights of what is exported may be zero because of it."""
        return self.dead_parameters(table) > 0

    def dead_groups(self) -> str | None:
        """What it prunes whole, `neuron` or `head`, so that an export may leave it out; None: weights one by one."""
        return None

    def idle_products(self, table: ParameterTable, context: StepContext) -> float:
        """Products of a token with parameters that it holds at zero after a step, in a forward pass."""
        return 0.0

    def zero_pattern(self, layer: int, context: StepContext) -> tuple[int, int] | None:
        """(n, m) where at most n of any m neighbours along a matrix's input are not zero in what is exported.

        Args:
            layer: from 0, of the matrices that have zeros.
            context: the step of the checkpoint.
        """
        return None

    def layers_differ(self, model: ModelConfig) -> bool:
        """Whether it gives layers of one kind different parameters, so that checkpoints cannot stack them."""
        return False

    def token_halo(self, model: ModelConfig) -> int | None:
        """Tokens before its own whose ids a layer needs for a token; 0: its own alone. None: it reads no ids.

        With it, every layer's forward pass gets `context`, as `model.tokens.token_context` makes it.
        """
        return None

    def transformer_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of Megatron-Core's TransformerConfig that it needs."""
        return {}

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """What a token's residual state is."""
        return ResidualState()

    def residual_path(self, model: ModelConfig) -> ResidualPath | None:
        """How its branches read and write the residual state; None leaves them as they are."""
        return None

    def layer_spec(self, spec: ModuleSpec, site: LayerSite) -> ModuleSpec:
        """The spec of a layer with its own modules in Megatron-Core's places. Local."""
        return spec

    def model_at(self, model: ModelConfig, context: StepContext) -> ModelConfig:
        """What the model is in a step: what its operations are counted of, and what is exported."""
        return model

    def plugin(self, parts: StepParts) -> Plugin | None:
        """What acts inside the step of this rank. Collective over all processes."""
        return None

    def effective_weight(self, kind: ParameterKind, layer: int, weight: Tensor, context: StepContext) -> Tensor:
        """What the model computes with in place of a stored weight of a layer: what is exported.

        Args:
            kind: of parameter.
            layer: from 0.
            weight: as a checkpoint holds it, one copy, whole.
            context: the step of the checkpoint.
        """
        return weight

    def plain_tensors(self, model: ModelConfig, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a checkpoint holds, with every matrix that is computed from others in their place; lazily.

        Args:
            model: of the run.
            stored: tensors under their names in a single-process GPTModel.
        """
        return stored

    def make_plain(self, model: GPTModel) -> None:
        """Give a whole model, in place, such matrices as its parameters. Local."""

    def folded(self, table: ParameterTable, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is exported, with what it computes beside matrices made a part of them; lazily.

        Args:
            table: of the run.
            tensors: what the model computes with, under their names in a single-process GPTModel.
        """
        return tensors

    def fold(self, model: ModelConfig, whole: GPTModel) -> None:
        """Let a whole model, whose parameters are `folded` ones, not compute that again. Local."""

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> Any:
        """Its `metrics.group.StatisticsGroup`, or None.

        Args:
            models: the GPTModel chunks of this rank, without wrappers.
            plugin: what `plugin` gave.
        """
        return None

    def saved_bytes(self, model: ModelConfig, layer: int, rank: RankShape) -> dict[str, int]:
        """Bytes by module that layer `layer` keeps for its backward pass, beside what the plain layer keeps."""
        return {}

    def optimizer_bytes(self, kind: ParameterKind) -> int:
        """Bytes that it keeps for each parameter of a kind, sharded as the optimizer's state is."""
        return 0

    def weight_bytes(self, kind: ParameterKind, value_bytes: int) -> int:
        """Bytes that it keeps for each parameter of a kind on every rank that holds it.

        Args:
            kind: of parameter.
            value_bytes: of the weight itself.
        """
        return 0

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Mechanism:
        """Its settings for a small model of the same architecture, as an audit steps it.

        Args:
            model: the run's.
            small: with fewer layers and smaller sizes.
        """
        return self

    def export(self, model: ModelConfig) -> Folds | Module | Refused:
        """How a HuggingFace directory holds it."""
        return Refused("it cannot be exported; train without it to export")

    def key(self, setting: str) -> str:
        """A setting as messages name it."""
        return f"mechanisms.{self.name}.{setting}"


def latent_conflict(mechanism: Mechanism, model: ModelConfig, why: str) -> Iterator[str]:
    """The line of a mechanism that has no place in latent attention, if the model has that; `why` says what to do."""
    if model.multi_latent_attention:
        yield f"model.multi_latent_attention: true, but mechanisms.{mechanism.name} {why}"


def configured(config: RunConfig) -> tuple[Mechanism, ...]:
    """The mechanisms of a run, in the order of its file."""
    return tuple(config.mechanisms.values())


def model_at(config: RunConfig, context: StepContext) -> ModelConfig:
    """What the model of a run is in a step; the configuration's own object unless a mechanism changes it."""
    model = config.model
    for mechanism in configured(config):
        model = mechanism.model_at(model, context)
    return model


def token_halo(config: RunConfig) -> int | None:
    """Tokens before its own whose ids some layer of a run needs for a token; None: no layer reads ids."""
    halos = [mechanism.token_halo(config.model) for mechanism in configured(config)]
    return max((halo for halo in halos if halo is not None), default=None)


def residual_state(config: RunConfig) -> ResidualState:
    """What a token's residual state is in a run, whose mechanisms have one path of their own at most."""
    states = [mechanism.residual_state(config.model) for mechanism in configured(config)]
    return next((state for state in states if state != ResidualState()), ResidualState())


def mixed(mixin: type, base: type) -> type:
    """`base` with what `mixin` adds or overrides: a backend's module keeps its parameters and their names."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
