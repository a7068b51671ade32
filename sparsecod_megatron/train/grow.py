"""A run continued with more layers, each a copy of one of its own: weights, fp32 weights, moments, step and data place.

It lies here and not beside `checkpoint/merging.py` because moments come with an optimizer, which only training builds.
Doubling a middle block (0,1,2,3,2,3,4,5) is MIDAS's growth, doubling layers one by one (0,1,2,2,3,3,4,5) LIDAS's; when
they grow is the caller's matter (one call per stage).

Source: Kapl et al., Do Depth-Grown Models Overcome the Curse of Depth? (arXiv 2512.08819), by its abstract.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.manifest import require_undamaged
from sparsecod_megatron.checkpoint.paths import tokenizer_dir
from sparsecod_megatron.checkpoint.saver import save_checkpoint
from sparsecod_megatron.checkpoint.state import StateFile, read_state, saved_config
from sparsecod_megatron.checkpoint.stream import CheckpointTensors
from sparsecod_megatron.checkpoint.whole import whole_model
from sparsecod_megatron.config import ModelConfig, ParallelConfig, RunConfig, save_config
from sparsecod_megatron.config.check import check_config
from sparsecod_megatron.config.flops import is_windowed
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, TOKENIZER_DIR
from sparsecod_megatron.errors import CheckpointError, ConfigError
from sparsecod_megatron.files import making_output, write_text
from sparsecod_megatron.model import unwrap
from sparsecod_megatron.parallel import running_processes
from sparsecod_megatron.parallel.owned_slices import held_slices, working_parts
from sparsecod_megatron.train.setup import Trainer, build_trainer

GROW_FILE = "grow.json"
"""Name of the file that says what a run was grown from."""
_OUTPUTS = ("attention_output", "mlp_output")
_MASTER, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")
_SEQUENCES, _LONGEST = 4, 128


@dataclass(frozen=True)
class Grown:
    """What growing a model changed, on random tokens.

    Attributes:
        before: loss in nats per token, on next tokens as the model before predicts them: its entropy.
        after: of the grown model, on the same predictions.
        largest: |difference of logits|.
    """

    before: float
    after: float
    largest: float


def grow(step_dir: Path, layers: Sequence[int], output: Path, backend: Backend, *, silence: bool = False) -> Grown:
    """Write a run directory with one checkpoint. Local: one process that is in no process group.

    Args:
        step_dir: a checkpoint of any layout.
        layers: of the model, from 0; which one each new layer copies.
        output: run directory to make.
        backend: the selected backend.
        silence: let the branches of copies give zero: their output projections, with the moments of these, are zero.

    Raises:
        CheckpointError: damaged, without moments, or its layers cannot stand elsewhere.
        ConfigError: a map that its layers do not fit, or a grown run that cannot be.
        ConversionError: `output` is in use.
    """
    require_undamaged(step_dir, digests=True)
    state, saved = read_state(step_dir), saved_config(step_dir)
    _check(step_dir, state, saved)
    silenced = _copies(layers, saved.model) if silence else ()
    config = replace(
        saved, model=_grown_model(saved.model, layers), logging=replace(saved.logging, run_dir=str(output))
    )
    check_config(config)
    # Reference layers name every parameter as checkpoints are read.
    reference = replace(backend, transformer_engine=False)
    tokens = _tokens(config)
    with whole_model(step_dir, backend) as whole:
        before = whole.logits(tokens)
    with making_output(output) as folder:
        step = _written(step_dir, layers, silenced, config, state, folder, reference)
        with whole_model(step, backend) as whole:
            after = whole.logits(tokens)
        if silence and not torch.equal(before, after):
            raise CheckpointError(
                f"{step_dir}: silent copies change its logits, which should not be; nothing is written"
            )
        save_config(config, folder / CONFIG_FILE)
        if (tokenizer := tokenizer_dir(step_dir)) is not None:
            shutil.copytree(tokenizer, folder / TOKENIZER_DIR)
        lineage = {"checkpoint": str(step_dir), "layers": list(layers), "silenced": list(silenced)}
        write_text(folder / GROW_FILE, json.dumps(lineage, indent=2) + "\n")
    probabilities = before.double().softmax(-1)
    before_loss, after_loss = (
        -float((probabilities * logits.double().log_softmax(-1)).sum(-1).mean()) for logits in (before, after)
    )
    return Grown(before_loss, after_loss, float((before - after).abs().max()))


def _check(step_dir: Path, state: StateFile, saved: RunConfig) -> None:
    if state.is_weights_alone:
        raise CheckpointError(
            f"{step_dir}: holds weights alone, without moments to copy; grow a checkpoint of training"
        )
    if saved.optimizer.optimizer != "adam":
        raise ConfigError(f"optimizer.optimizer: {saved.optimizer.optimizer}, but growing copies AdamW's moments alone")
    if saved.precision.fp8:
        raise ConfigError(f"precision.fp8_recipe: {saved.precision.fp8_recipe}, whose scales are of each layer's place")
    for name in saved.mechanisms:
        raise ConfigError(f"mechanisms.{name}: may depend on a layer's place or on their number; grow runs without any")


def _grown_model(model: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The model with these layers, each of which must be what it was in its new place."""
    wrong = [layer for layer in layers if not 0 <= layer < model.num_layers]
    if wrong:
        raise ConfigError(f"--layers: {wrong[0]} is not one of the model's {model.num_layers} layers, counted from 0")
    topk = model.moe_router_topk_per_layer
    moe = [model.is_moe_layer(layer) for layer in layers]
    grown = replace(
        model,
        num_layers=len(layers),
        moe_router_topk_per_layer=topk and [topk[layer] for layer in layers],
        moe_first_k_dense_layers=moe.index(True) if True in moe else model.moe_first_k_dense_layers,
    )
    for place, layer in enumerate(layers):
        for key, of in (
            ("moe_first_k_dense_layers", ModelConfig.is_moe_layer),
            ("mix_post_fraction", ModelConfig.is_post_norm),
            ("layernorm_scaling", ModelConfig.scale),
            ("window_attn_skip_freq", is_windowed),
        ):
            if of(grown, place) != of(model, layer):
                value = getattr(model, key)
                raise ConfigError(
                    f"model.{key}: {str(value).lower()} makes layer {place} another than layer {layer} was, of which "
                    "it is a copy; give other --layers"
                )
    return grown


def _copies(layers: Sequence[int], model: ModelConfig) -> tuple[int, ...]:
    """Places of second copies, without which the model is the one before."""
    first = [place for place, layer in enumerate(layers) if layer not in layers[:place]]
    if [layers[place] for place in first] != list(range(model.num_layers)):
        raise ConfigError(
            f"--silence: keeps what the model computes where each of its {model.num_layers} layers comes, first in its "
            f"order, not with --layers {','.join(map(str, layers))}"
        )
    if model.norm_placement in ("post", "mix"):
        raise ConfigError(
            f"--silence: model.norm_placement={model.norm_placement} normalises the stream behind a silent branch too; "
            "leave it out"
        )
    return tuple(place for place in range(len(layers)) if place not in first)


def _tokens(config: RunConfig) -> Tensor:
    vocabulary = config.model.vocab_size
    assert vocabulary is not None, "a saved run knows its vocabulary"
    length, generator = min(config.data.seq_length, _LONGEST), torch.Generator().manual_seed(config.train.seed)
    return torch.randint(vocabulary, (_SEQUENCES, length), generator=generator)


def _written(
    step_dir: Path,
    layers: Sequence[int],
    silenced: Sequence[int],
    config: RunConfig,
    state: StateFile,
    folder: Path,
    backend: Backend,
) -> Path:
    """The checkpoint, from a trainer of one process."""
    one = replace(config, parallel=ParallelConfig())
    with (
        running_processes(one, communication=backend.communication, device=backend.device) as groups,
        ExitStack() as files,
    ):
        trainer = build_trainer(one, backend, groups)
        table = ParameterTable.of(config)

        def source_of(name: str) -> str:
            found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            return name if found is None else f"decoder.layers.{layers[int(found[1])]}.{found[2]}"

        silent = {
            name
            for name, _ in unwrap(trainer.models[0]).named_parameters()
            if (found := re.match(r"decoder\.layers\.(\d+)\.", name)) and int(found[1]) in silenced
            if table.find(name).init in _OUTPUTS
        }
        sources = {kind: CheckpointTensors(step_dir, files, kind) for kind in (None, _MASTER, *_MOMENTS)}
        with torch.no_grad():
            for name, kind, tensor in _tensors(trainer, state.train.optimizer_steps):
                if name in silent:
                    tensor.zero_()
                else:
                    tensor.copy_(sources[kind][source_of(name)].view(tensor.shape))
        trainer.scheduler.num_steps = 0  # loading adds the checkpoint's to them
        trainer.scheduler.load_state_dict(state.scheduler)
        return save_checkpoint(folder / CHECKPOINTS_DIR, trainer, state=state.train)


def _tensors(trainer: Trainer, optimizer_steps: int) -> Iterator[tuple[str, str | None, Tensor]]:
    """(name, the optimizer's kind or None, tensor to fill): the model's first, then what the optimizer keeps of it."""
    model = unwrap(trainer.models[0])
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept = model.state_dict()
    yield from ((name, None, parameter) for parameter, name in names.items())
    yield from ((name, None, buffer) for name, buffer in model.named_buffers() if name in kept)
    assert isinstance(trainer.optimizer, ChainedOptimizer)
    for part in working_parts(trainer.optimizer):
        whole: dict[str, Any] = part.state_dict()
        for group in whole["optimizer"]["param_groups"]:
            group["step"] = optimizer_steps
        part.load_state_dict(whole)  # allocates moments, not more
        for parameter, master, (start, end) in held_slices(part, trainer.groups):
            assert end - start == parameter.numel(), "one process steps whole parameters"
            yield names[parameter], _MASTER, master
            for kind in _MOMENTS:
                yield names[parameter], kind, part.optimizer.state[master][kind]
