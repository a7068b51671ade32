"""What a compression method is: what it must be given, what it does to a model, and what it leaves beside the weights.

A method changes the model it is given, through `Changes`, which measures every matrix on the way. What becomes of it is
one of three kinds of directory:

- a stock one, where the class and its configuration can say what the model computes. Shapes may be others than before:
  the method sets the configuration's fields, and `Changes.put` takes the new tensors;
- our own class (`own_class.py`), where modules were exchanged: `Outcome.structure` says how `build` makes them again;
- either of them with a sidecar, where files that others load hold only a part of what was measured:
  `Outcome.sidecar` is handed to `restore` whenever the directory is opened by `models/opening.py`.

A method stays small: all but `compress` has a neutral default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.compression.calibration import feeder
from sparsecod_megatron.compression.changes import Changes
from sparsecod_megatron.compression.progress import Progress
from sparsecod_megatron.config.fields import bound_problems
from sparsecod_megatron.config.typed import merge_typed, read_updates
from sparsecod_megatron.errors import CheckpointError, ConfigError
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.parallel.processes import Processes


@dataclass(frozen=True)
class Needs:
    """What a method must be given besides one model.

    Attributes:
        calibration: token sequences, to run the model over.
        gradients: autograd; without it a method runs as under `torch.no_grad`.
        several_models: two models or more, of one architecture.
        modelopt: NVIDIA ModelOpt, installed.
        whole_model: every weight in memory. A method without this need asks `Material.residency` for what it looks at.
    """

    calibration: bool = False
    gradients: bool = False
    several_models: bool = False
    modelopt: bool = False
    whole_model: bool = True


@dataclass
class NoSettings:
    """A method without settings."""


@dataclass(frozen=True)
class Material:
    """What a method works on.

    Attributes:
        model: a causal LM in evaluation mode, which becomes the compressed one.
        changes: writes into `model` and measures.
        others: the further models of a method that takes several. Each is opened when it is asked for, and gone when
            the next one is.
        sequences: calibration data, int64 `[sequences, tokens]`; None where the method needs none.
        batch_size: sequences of a forward pass.
        processes: those that do the same work together; each has the whole model and all sequences.
        progress: where a method that takes long keeps what is done, to continue from there.
    """

    model: PreTrainedModel
    changes: Changes
    others: Iterator[PreTrainedModel]
    sequences: Tensor | None
    batch_size: int
    processes: Processes = Processes()
    progress: Progress = Progress()

    @property
    def residency(self) -> Residency:
        """Where the weights of `model` are."""
        return self.changes.residency

    def part(self) -> Tensor:
        """This process's calibration sequences, int64 `[sequences, tokens]`, at least one.

        Raises:
            ConfigError: more processes than sequences.
        """
        assert self.sequences is not None, "a method that does not declare `needs.calibration` asks for it"
        if len(self.sequences) < self.processes.size:
            raise ConfigError(f"--nproc {self.processes.size}: more than --samples {len(self.sequences)}; lower it")
        return self.sequences[self.processes.places(len(self.sequences))]

    def feed(self, model: nn.Module) -> None:
        """Run a model, the given one or one made of it, over the calibration data without gradients."""
        assert self.sequences is not None, "a method that does not declare `needs.calibration` asks for it"
        feeder(self.sequences, self.batch_size)(model)


@dataclass(frozen=True)
class Outcome:
    """What a method leaves besides the changed model.

    Attributes:
        simulated: computes what the directory will compute once `restore` has run, where the changed model does not.
        structure: of exchanged modules, plain data for `build`; None leaves the model in its class.
        sidecar: plain data for `restore`; the registry line names the file.
        warnings: what a user should know before trusting the result, one sentence each.
    """

    simulated: PreTrainedModel | None = None
    structure: dict[str, Any] | None = None
    sidecar: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


class Method(ABC):
    """One compression method.

    Args:
        settings: an instance of its `Settings`, within the bounds of their fields.

    Raises:
        ConfigError: settings that contradict each other.
    """

    name: str
    """As in the registry, and what follows it after a `+`."""
    needs: Needs = Needs()
    Settings: ClassVar[type] = NoSettings
    """A dataclass; a field's bounds are given as in the configuration's schema (`config/fields.py`)."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def named(cls, name: str, settings: Any) -> Method:
        """The method by the whole name that a user gave, whose first word, before any `+`, is the registry's.

        Raises:
            ConfigError: words after a `+` that it does not know, or settings that contradict each other.
        """
        if name != cls.name:
            raise ConfigError(f"--method {name}: nothing can follow {cls.name}; leave +… out")
        return cls(settings)

    @abstractmethod
    def compress(self, material: Material) -> Outcome:
        """Change the model.

        Raises:
            ConversionError: a model that the method cannot take.
        """

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Why the method leaves a matrix as it is.

        Args:
            module: that holds it.
            weight: `[..., out, in]` of a linear layer or fused experts, any shape of two axes or more elsewhere.

        Returns:
            One clause, or nothing where it takes the matrix.
        """
        return "this method leaves it"

    def write(  # noqa: B027  (a neutral default, not a forgotten body)
        self, outcome: Outcome, folder: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write further files, for others' readers, into the model's directory; may use up `outcome.simulated`."""

    @classmethod
    def build(cls, model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
        """Exchange modules as `compress` did, in place; their weights are loaded afterwards.

        Raises:
            CheckpointError: a structure that does not fit the model.
        """
        raise CheckpointError(f"{cls.name} exchanges no modules; the directory names the wrong method")

    @classmethod
    def restore(cls, model: PreTrainedModel, sidecar: Mapping[str, Any]) -> None:
        """Make a model as loaded compute what was measured, in place.

        Raises:
            CheckpointError: a sidecar that does not fit the model.
        """
        raise CheckpointError(f"{cls.name} has no sidecar; the file names the wrong method")


def read_settings(method: type[Method], name: str, assignments: Sequence[str]) -> Any:
    """A method's settings from `key=value`.

    Args:
        method: the class.
        name: as the user gave it.
        assignments: later ones win.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of bounds.
    """
    if assignments and not fields(method.Settings):
        raise ConfigError(f"--set {assignments[0]}: --method {name} has no settings; leave it out")
    settings: Any = merge_typed(method.Settings, read_updates(method.Settings, None, assignments))
    for problem in bound_problems(settings):
        raise ConfigError(f"--method {name}: {problem}")
    return settings
