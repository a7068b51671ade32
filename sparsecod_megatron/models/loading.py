"""Loading a HuggingFace model directory, refusing whatever transformers would otherwise repair silently."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sparsecod_megatron.compression.own_class  # noqa: F401  (registers our architectures)
from sparsecod_megatron.errors import CheckpointError, ConfigError
from sparsecod_megatron.hf.expert_modules import avoid_unaligned_products
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.hf.streaming import Streamed
from sparsecod_megatron.mechanisms.exports import know_extensions


def load_model(directory: Path, *, dtype: str, device: str) -> PreTrainedModel:
    """Load a causal LM of stock transformers in evaluation mode.

    Args:
        directory: folder with `config.json` and the weights.
        dtype: `float32` or `bfloat16`, the type of weights and computation.
        device: `cpu` or `cuda`.

    Raises:
        CheckpointError: no such folder, no `config.json`, unreadable weights, weights that the architecture needs
            and the folder lacks (transformers would fill them with random numbers), or ModelOpt's quantised weights
            (transformers would take them without their scales).
    """
    _check(directory)
    know_extensions()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load this model: {error}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise CheckpointError(
            f"{directory}: the weight files lack {len(missing)} tensors, the first {missing[0]}; export it again"
        )
    avoid_unaligned_products(model)
    return model.to(device)  # in evaluation mode since `from_pretrained`


def stream_model(directory: Path, *, dtype: str, device: str, scratch: Path) -> Residency:
    """As `load_model`, but a block is in memory only while it is needed.

    Args:
        directory: as of `load_model`.
        dtype: likewise.
        device: likewise.
        scratch: folder on the disk for what else is not to be in memory; nothing stays there.

    Raises:
        CheckpointError: as `load_model`, where weights are missing once their block is needed.
        ConversionError: weights that are not in safetensors, or a model that cannot be taken apart like this.
    """
    _check(directory)
    know_extensions()
    return Streamed(directory, dtype=getattr(torch, dtype), device=device, scratch=scratch)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Raises:
        CheckpointError: no such folder, or no tokenizer in it.
    """
    check_model_directory(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: no tokenizer that transformers can load; copy tokenizer.json and tokenizer_config.json there"
        ) from error


def usable_device(asked: str | None) -> str:
    """Where to compute: what was asked for, or cuda where there is one; of several GPUs each process takes its own.

    Raises:
        ConfigError: `cuda` on a machine without it.
    """
    if not torch.cuda.is_available():
        if asked == "cuda":
            raise ConfigError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return asked or "cuda"


def check_model_directory(directory: Path) -> None:
    """Refuse a path that is not a HuggingFace model directory.

    Raises:
        CheckpointError: no such folder, or it has no `config.json`.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"--model {directory}: no such folder; give a HuggingFace model directory, as `sparsecod export` writes"
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"--model {directory}: has no config.json; give a HuggingFace model directory, as `sparsecod export` writes"
        )


def _check(directory: Path) -> None:
    check_model_directory(directory)
    if _for_engines(directory):
        raise CheckpointError(
            f"{directory}: 8-bit weights for inference engines, whose scales transformers leaves out; give the folder "
            "above, which `sparsecod compress` wrote"
        )


def _for_engines(directory: Path) -> bool:
    """Whether ModelOpt wrote the directory for inference engines; damage to config.json is found by transformers."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "modelopt"
    except (ValueError, KeyError, TypeError):
        return False
