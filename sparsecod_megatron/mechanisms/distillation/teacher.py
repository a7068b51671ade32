"""The teacher: a second model in the run's own layout, with a HuggingFace directory's weights, that nothing trains.

Every rank reads the directory's tensors one at a time, under the names of the import's tables, and keeps its shards. No
checkpoint holds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.check import check_config
from sparsecod_megatron.config.megatron_fields import FUNCTION_FIELDS
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.hf.source import HFSource
from sparsecod_megatron.mechanisms.directory_shards import directory_shards, opened_directory
from sparsecod_megatron.model import build_model, transformer_config, unwrap

FRESH = ":fresh:"
"""In place of a directory: random weights of the run's own shape, for audits and tests."""
FRESH_SEED = 1
"""Seed of those weights, whatever `train.seed` says: a resumed run has the same teacher."""
DIGEST_BYTES = 32
_BLOCK = 1 << 22


class Teacher:
    """The model chunks of this rank.

    Args:
        directory: a HuggingFace directory, or `FRESH`.
        config: of the run.
        groups: its process groups.
        key: of the directory, for messages.

    Attributes:
        chunks: in evaluation mode, without gradients; of the last one the output layer is left out of `forward`.
        digest: SHA-256 of its files, [32] uint8 on the CPU.

    Raises:
        ConfigError: it cannot be read, or is of another shape than the student.
    """

    @torch.no_grad()
    def __init__(self, directory: str, config: RunConfig, groups: ProcessGroupCollection, *, key: str) -> None:
        source = None if directory == FRESH else opened_directory(directory, config, key=key)
        teacher = _teacher_config(config, source, key)
        backend = select_backend()
        megatron = transformer_config(teacher, transformer_engine=backend.transformer_engine)
        self.chunks: list[torch.nn.Module] = build_model(
            teacher, megatron, groups, device=backend.device, transformer_engine=backend.transformer_engine
        )
        self.models: Sequence[GPTModel] = [unwrap(chunk) for chunk in self.chunks]
        if source is not None:
            for target, values in directory_shards(source, teacher, self.models, groups, key=key):
                target.copy_(values)
        self._tied = [model.shared_embedding_or_output_weight() if _is_tied(model) else None for model in self.models]
        for model in self.models:
            model.requires_grad_(False)
            model.eval()
            model.post_process = False
        self.digest = _digest(source)

    @torch.no_grad()
    def logits(self, chunk: int, states: Tensor) -> Tensor:
        """[S, B, V / TP] of the states behind the final norm, [S_local, B, H]. Collective over the TP group."""
        found: Tensor = self.models[chunk].output_layer(states, weight=self._tied[chunk])[0]
        return found


def _teacher_config(config: RunConfig, source: HFSource | None, key: str) -> RunConfig:
    """The run with the teacher's model, without FP8 and without what changes another function or saves memory."""
    model: ModelConfig = config.model if source is None else source.model
    megatron = {
        name: value
        for name, value in config.megatron.items()
        if (source is None or name not in FUNCTION_FIELDS) and not name.startswith("recompute")
    }
    precision = replace(config.precision, fp8_recipe="none", fp8_param_gather=False)
    train = replace(config.train, seed=FRESH_SEED)
    found = replace(config, model=model, precision=precision, train=train, megatron=megatron, mechanisms={})
    try:
        check_config(found)
    except ConfigError as error:
        raise ConfigError(f"{key}: the teacher does not fit this run: {error}") from error
    return found


def _is_tied(model: GPTModel) -> bool:
    return bool(model.share_embeddings_and_output_weights and model.post_process)


def _digest(source: HFSource | None) -> Tensor:
    """SHA-256 of what the first process reads; zeros of fresh weights. Collective over all processes."""
    device = select_backend().device
    found = torch.zeros(DIGEST_BYTES, dtype=torch.uint8, device=device)
    if source is not None:
        if dist.get_rank() == 0:
            digest = hashlib.sha256()
            for path in (source.directory / "config.json", *source.files.paths):
                with path.open("rb") as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
            found.copy_(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
        dist.broadcast(found, src=0)
    return found.cpu()
