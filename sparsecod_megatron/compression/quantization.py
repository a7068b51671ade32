"""What the 8-bit methods share: rounded weights, the ranges of layer inputs beside them, and files for engines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.modelopt import quiet_modelopt, warnings_about
from sparsecod_megatron.errors import CheckpointError

ENGINE_FOLDER = "engine"
MODEL_TYPES_WITHOUT_ENGINE = ("sparsecod",)
"""No inference engine has these; 8-bit files of them would be of no use."""


class Quantization(Method):
    """Post-training quantisation of weights and of what enters a layer, to the grid that `name` says."""

    needs = Needs(calibration=True, modelopt=True)

    def compress(self, material: Material) -> Outcome:
        """Round the weights, and keep a model that rounds its inputs too."""
        simulated = copy.deepcopy(material.model)
        with quiet_modelopt():
            from sparsecod_megatron.compression.rounding import input_ranges, quantize, rounded_weights

            unreached = quantize(simulated, self.name, material.feed)
            weights, ranges = rounded_weights(simulated), input_ranges(simulated)
        for name, weight in weights.items():
            material.changes.put(name, weight)
        return Outcome(simulated=simulated, sidecar={"ranges": ranges}, warnings=warnings_about(unreached))

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """ModelOpt passes over routers."""
        return "ModelOpt skips routers, gates of experts and layers that are not linear"

    def write(self, outcome: Outcome, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """ModelOpt's unified checkpoint, which inference engines load."""
        assert outcome.simulated is not None
        if outcome.simulated.config.model_type in MODEL_TYPES_WITHOUT_ENGINE:
            return
        with quiet_modelopt():
            from modelopt.torch.export import export_hf_checkpoint

            with torch.inference_mode():
                export_hf_checkpoint(outcome.simulated, export_dir=folder / ENGINE_FOLDER)
        tokenizer.save_pretrained(folder / ENGINE_FOLDER)

    @classmethod
    def restore(cls, model: PreTrainedModel, sidecar: Mapping[str, Any]) -> None:
        """Round the inputs of the layers as they were rounded when the model was measured."""
        ranges = sidecar.get("ranges")
        if not isinstance(ranges, dict):
            raise CheckpointError("holds no `ranges`")
        with quiet_modelopt():
            from sparsecod_megatron.compression.rounding import round_inputs

            round_inputs(model, cls.name, ranges)
