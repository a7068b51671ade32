"""One model through one method, and the directory that comes of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.compression.changes import Changes, MatrixChange
from sparsecod_megatron.compression.method import Material, Method, Outcome
from sparsecod_megatron.compression.own_class import CompressedConfig
from sparsecod_megatron.compression.progress import Progress
from sparsecod_megatron.compression.registry import METHODS, method_class
from sparsecod_megatron.errors import CheckpointError, ConversionError, SparsecodError
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.parallel.processes import Processes


@dataclass(frozen=True)
class Compression:
    """What a method made of a model.

    Attributes:
        method: it.
        model: the model, now compressed.
        outcome: what else the method left.
        matrices: what happened to each matrix.
        num_parameters: before and after.
        warnings: what a user should know before trusting the result.
        residency: where the weights of `model` are.
    """

    method: Method
    model: PreTrainedModel
    outcome: Outcome
    matrices: list[MatrixChange]
    num_parameters: tuple[int, int]
    warnings: list[str]
    residency: Residency

    @property
    def scored(self) -> PreTrainedModel:
        """The model whose loss shows what the compression costs."""
        return self.outcome.simulated or self.model

    @property
    def scored_residency(self) -> Residency:
        """The same, with where its weights are."""
        return self.residency if self.scored is self.model else Residency(self.scored)


def compress(
    model: PreTrainedModel,
    method: Method,
    sequences: Tensor,
    *,
    batch_size: int,
    others: Iterable[PreTrainedModel] = (),
    processes: Processes | None = None,
    work: Path | None = None,
    residency: Residency | None = None,
) -> Compression:
    """Compress a model, in place.

    Args:
        model: a causal LM; set to evaluation mode.
        method: from the registry, or any of the contract.
        sequences: calibration data, int64 `[sequences, tokens]`; kept from a method that does not declare to need it.
        batch_size: sequences of a forward pass.
        others: further models, for a method that takes several.
        processes: those that do the same work together, each with the same arguments; None is this one alone.
        work: folder for what is done already, of this model, method and data alone; None keeps nothing. A call that
            finds something there continues from it.
        residency: where the model's weights are; None has all of them in memory. A method that needs the whole model
            takes no other, and others need `work`.

    Raises:
        ConversionError: a model that the method cannot take, or nothing in it was compressed.
    """
    residency, together = residency or Residency(model), processes or Processes()
    assert residency.is_whole or not method.needs.whole_model, f"{method.name} needs the whole model"
    before, changes = model.eval().num_parameters(), Changes(residency)
    residency.begin(work and work / "changed", together)
    calibration = sequences if method.needs.calibration else None
    with torch.set_grad_enabled(method.needs.gradients), _refusing(model, method):
        material = Material(model, changes, iter(others), calibration, batch_size, together, Progress(work))
        outcome = method.compress(material)
    rows = changes.rows(method.reason)
    if not any(row.compressed for row in rows):
        reasons = sorted({row.reason for row in rows}) or ["the model has no matrices but embeddings and output layer"]
        raise ConversionError(f"--method {method.name}: no linear layer was compressed: {'; '.join(reasons)}")
    warnings = [*_warnings(rows), *outcome.warnings]
    return Compression(method, model, outcome, rows, (before, model.num_parameters()), warnings, residency)


@contextlib.contextmanager
def _refusing(model: PreTrainedModel, method: Method) -> Iterator[None]:
    """What a method does not foresee in a model's code, as one line."""
    try:
        yield
    except (SparsecodError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(
            f"--method {method.name}: cannot take {type(model).__name__} ({type(error).__name__}: {reason}); use "
            "another method"
        ) from error


def write_model(compression: Compression, tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write what `open_model` opens, and whatever else the method writes; ends the use of `scored`.

    Args:
        compression: what a method made of the model in `source`.
        tokenizer: the model's.
        source: directory of the original; its modeling files, where it has any, come along.
        folder: existing directory to fill.
    """
    method, outcome = compression.method, compression.outcome
    compression.residency.save(folder)
    if outcome.structure is not None:
        CompressedConfig.of(compression.model, method.name, outcome.structure).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in source.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    if outcome.sidecar is not None:
        file_name = METHODS[method.name].sidecar
        assert file_name is not None, f"the registry names no sidecar for {method.name}"
        content = {"method": method.name, **outcome.sidecar}
        (folder / file_name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    method.write(outcome, folder, tokenizer)


def sidecar_of(directory: Path) -> Path | None:
    """The file that says what a model directory's weights alone do not, if it has one."""
    names = dict.fromkeys(entry.sidecar for entry in METHODS.values() if entry.sidecar is not None)
    return next((directory / name for name in names if (directory / name).is_file()), None)


def restore(model: PreTrainedModel, sidecar: Path) -> None:
    """Make a model loaded from a compressed directory compute as it was measured, in place.

    Args:
        model: as transformers loaded it.
        sidecar: from `sidecar_of` its directory.

    Raises:
        CheckpointError: a file that cannot be read or belongs to another model.
        ConfigError: a package that the method needs is not installed.
    """
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        name = content.pop("method")
        if METHODS[name].sidecar != sidecar.name:
            raise ValueError(f"{name} does not write this file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{sidecar}: not what `sparsecod compress` writes: {error}") from error
    try:
        method_class(name).restore(model, content)
    except CheckpointError as error:
        raise CheckpointError(f"{sidecar}: {error}") from error


def _warnings(rows: list[MatrixChange]) -> list[str]:
    warnings, total = [], sum(row.num_weights for row in rows)
    for reason in sorted({row.reason for row in rows if row.reason}):
        left = [row for row in rows if row.reason == reason]
        share, kinds = sum(row.num_weights for row in left) / total, ", ".join(sorted({row.kind for row in left}))
        warnings.append(f"{share:.2%} of the weights stay as they were ({kinds}): {reason}")
    if unmeasured := [row for row in rows if row.unmeasured]:
        first = unmeasured[0]
        warnings.append(f"the error of {len(unmeasured)} matrices is not measured; {first.name}: {first.unmeasured}")
    return warnings
