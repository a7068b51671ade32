"""Models whose modules compression has exchanged, as directories that transformers loads once this file is imported.

`config.json` says `model_type: sparsecod_compressed`, with the original's configuration, the method, and what the
method needs to build its modules again. transformers without this package refuses such a directory; with a stock
`model_type` it would fill the modules that it does not know with random numbers.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import sparsecod_megatron.hf  # noqa: F401  (registers the sparsecod architecture)
from sparsecod_megatron.compression.registry import METHODS, method_class
from sparsecod_megatron.errors import CheckpointError


class CompressedConfig(PreTrainedConfig):
    """What a method made of which model.

    Attributes:
        method: its name.
        structure: for the method's `build`.
        base: the original's configuration, with its `model_type`.
    """

    model_type = "sparsecod_compressed"

    method: str = ""
    structure: Any = None
    base: Any = None

    @classmethod
    def of(cls, model: PreTrainedModel, method: str, structure: dict[str, Any]) -> CompressedConfig:
        """The configuration of a model whose modules `method` has exchanged, as the first method or a further one."""
        base = getattr(model, "compressed_config", model.config)
        return cls(method=method, structure=structure, base=base.to_dict())

    def base_config(self) -> PreTrainedConfig:
        """The original's configuration.

        Raises:
            CheckpointError: damaged, or of a model that transformers does not know.
        """
        fields = dict(self.base or {})
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: `base` is not a model's configuration: {error}") from error


class CompressedForCausalLM:
    """Loads such directories; what it returns is the original's class with exchanged modules."""

    config_class = CompressedConfig

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *arguments: Any, config: CompressedConfig, **options: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: a configuration that no method of this version wrote.
        """
        built, base = _class_with_structure(config)
        return built.from_pretrained(directory, *arguments, config=base, **options)


def _class_with_structure(config: CompressedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The original's class, whose `__init__` ends with the method's `build`, and its configuration.

    So modules are exchanged before transformers reads the weights. Where several methods exchanged some, the classes
    derive from each other, the first method's from the original's.
    """
    if config.method not in METHODS:
        raise CheckpointError(f"config.json: method {config.method!r} is unknown here; use the version that wrote it")
    method, base = method_class(config.method), config.base_config()
    if isinstance(base, CompressedConfig):
        original, base = _class_with_structure(base)
    else:
        with torch.device("meta"):  # the one public way from a configuration to its class
            original = type(AutoModelForCausalLM.from_config(copy.deepcopy(base)))

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        original.__init__(self, *arguments, **options)
        method.build(self, config.structure)

    def save_pretrained(self: Any, folder: str | os.PathLike[str], **options: Any) -> None:
        original.save_pretrained(self, folder, **options)
        config.save_pretrained(folder)

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "compressed_config": config,
        "__module__": original.__module__,
    }
    return type(f"Compressed{original.__name__.removeprefix('Compressed')}", (original,), members), base


AutoConfig.register(CompressedConfig.model_type, CompressedConfig, exist_ok=True)
AutoModelForCausalLM.register(CompressedConfig, CompressedForCausalLM, exist_ok=True)
