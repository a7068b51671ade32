"""One model through one method, and the directory that comes of it."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.compression.calibration import feeder
from sparsecod_megatron.compression.matrices import Matrix, compare, eligible, follows_pattern
from sparsecod_megatron.compression.modelopt import quiet_modelopt, require_modelopt
from sparsecod_megatron.errors import CheckpointError, ConfigError, ConversionError, SparsecodError

SPARSITY_METHODS = ("sparse24", "sparsegpt24")
QUANTIZATION_METHODS = ("fp8", "int8")
METHODS = SPARSITY_METHODS + QUANTIZATION_METHODS
RANGES_FILE = "input_ranges.json"
ENGINE_FOLDER = "engine"
ENGINE_UNKNOWN = ("sparsecod",)
"""Architectures that no inference engine has; 8-bit files of them would be of no use."""


@dataclass(frozen=True)
class Compression:
    """What a method made of a model.

    Attributes:
        method: its name.
        model: the plain model, now with the compressed weights.
        simulated: under quantisation ModelOpt's model, which rounds inputs as well; None under sparsity.
        matrices: what happened to each matrix.
        warnings: what a user should know before trusting the result.
    """

    method: str
    model: PreTrainedModel
    simulated: PreTrainedModel | None
    matrices: list[Matrix]
    warnings: list[str]

    @property
    def scored(self) -> PreTrainedModel:
        """The model whose loss shows what the compression costs."""
        return self.simulated or self.model


def check_method(method: str) -> None:
    """Refuse an unknown method, and any without ModelOpt.

    Raises:
        ConfigError: one of the two.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method}: no such method; use {', '.join(METHODS)}")
    require_modelopt()


def compress(model: PreTrainedModel, method: str, sequences: Tensor, *, batch_size: int) -> Compression:
    """Compress a model; its own weights are replaced.

    Args:
        model: a causal LM; set to evaluation mode.
        method: one of `METHODS`.
        sequences: calibration data, int64 `[sequences, tokens]`; magnitude pruning needs none.
        batch_size: sequences of a forward pass.

    Raises:
        ConversionError: a model that the method cannot take, or nothing in it was compressed.
    """
    converted, feed = copy.deepcopy(model.eval()), feeder(sequences, batch_size)
    unreached: list[str] = []
    weights: Mapping[str, Tensor]
    with quiet_modelopt(), _refusing(model, method):
        if method in SPARSITY_METHODS:
            from sparsecod_megatron.compression.sparsify import prune_by_magnitude, prune_by_sparsegpt

            if method == "sparse24":
                prune_by_magnitude(converted)
            else:
                unreached = prune_by_sparsegpt(converted, feed)
            weights = {name: weight for name, weight in eligible(converted) if follows_pattern(weight)}
        else:
            from sparsecod_megatron.compression.quantize import quantize, rounded_weights

            unreached = quantize(converted, method, feed)
            with torch.no_grad():
                weights = rounded_weights(converted)
    matrices = compare(model, weights, method)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    simulated = converted if method in QUANTIZATION_METHODS else None
    return Compression(method, model, simulated, matrices, _warnings(matrices, unreached))


@contextlib.contextmanager
def _refusing(model: PreTrainedModel, method: str) -> Iterator[None]:
    """What ModelOpt does not foresee in a model's code, as one line."""
    try:
        yield
    except (SparsecodError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(
            f"--method {method}: ModelOpt cannot take {type(model).__name__} ({type(error).__name__}: {reason}); use "
            "another method"
        ) from error


def write_model(compression: Compression, tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write what transformers loads, and under quantisation what engines load; ends the use of `simulated`.

    Args:
        compression: what a method made of the model in `source`.
        tokenizer: the model's.
        source: directory of the original; its modeling files, where it has any, come along.
        folder: existing directory to fill.
    """
    compression.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in source.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    if compression.simulated is None:
        return
    with quiet_modelopt():
        from modelopt.torch.export import export_hf_checkpoint

        from sparsecod_megatron.compression.quantize import input_ranges

        ranges = {"method": compression.method, "ranges": input_ranges(compression.simulated)}
        (folder / RANGES_FILE).write_text(json.dumps(ranges, indent=1) + "\n", encoding="utf-8")
        if compression.model.config.model_type in ENGINE_UNKNOWN:
            return
        with torch.inference_mode():
            export_hf_checkpoint(compression.simulated, export_dir=folder / ENGINE_FOLDER)
        tokenizer.save_pretrained(folder / ENGINE_FOLDER)


def is_quantised(directory: Path) -> bool:
    """Whether quantisation wrote a model directory."""
    return (directory / RANGES_FILE).is_file()


def round_inputs_as_written(model: PreTrainedModel, directory: Path) -> bool:
    """Make a model loaded from a quantised directory compute as it was measured: rounding the inputs of its layers.

    Args:
        model: as transformers loaded it from `directory`.
        directory: any model directory.

    Returns:
        Whether the directory was written by quantisation; where it was not, nothing happens.

    Raises:
        CheckpointError: ranges that cannot be read or belong to another model.
        ConfigError: ModelOpt is not installed.
    """
    file = directory / RANGES_FILE
    if not file.is_file():
        return False
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        method, ranges = written["method"], dict(written["ranges"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not what `sparsecod compress` writes: {error}") from error
    check_method(method)
    with quiet_modelopt():
        from sparsecod_megatron.compression.quantize import round_inputs

        round_inputs(model, method, ranges)
    return True


def _warnings(matrices: list[Matrix], unreached: list[str]) -> list[str]:
    warnings, total = [], sum(row.num_weights for row in matrices)
    for reason in sorted({row.reason for row in matrices if row.reason}):
        rows = [row for row in matrices if row.reason == reason]
        share, kinds = sum(row.num_weights for row in rows) / total, ", ".join(sorted({row.kind for row in rows}))
        warnings.append(f"{share:.2%} of the weights stay as they were ({kinds}): {reason}")
    if unreached:
        warnings.append(
            f"no calibration token reached {len(unreached)} layers, the first {unreached[0]}; more --samples would"
        )
    return warnings
