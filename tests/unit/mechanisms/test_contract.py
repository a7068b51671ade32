"""What every mechanism must keep to in one process; under layouts, tests/dist/test_mechanisms.py."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import CheckpointError, ConfigError, ConversionError
from sparsecod_megatron.mechanisms import MECHANISMS, SAVED_MECHANISMS
from sparsecod_megatron.planning.layout import layout_of
from sparsecod_megatron.planning.memory import rank_memory
from tests.helpers.mechanisms import CASES
from tests.helpers.megatron import SMALL
from tests.helpers.memory import step_bytes
from tests.helpers.training import small_trainer, trainer_batches

DEPTH = ("model.num_layers=4",)
OWN_CODE = [name for name, case in CASES.items() if not case.like]
NEUTRAL = {name: case.neutral for name, case in CASES.items() if case.neutral}


def trained(trainer: Any, steps: int = 2) -> tuple[list[str], list[torch.Tensor]]:
    """Losses bit by bit, and every weight."""
    from sparsecod_megatron.train.step import train_step

    data = trainer_batches(trainer)
    losses = [train_step(trainer, data).loss.hex() for _ in range(steps)]
    return losses, [parameter.detach().clone() for parameter in trainer.models[0].parameters()]


def same_bits(ours: tuple[list[str], list[torch.Tensor]], theirs: tuple[list[str], list[torch.Tensor]]) -> bool:
    return ours[0] == theirs[0] and all(map(torch.equal, ours[1], theirs[1]))


@functools.cache
def dense_run(*overrides: str) -> tuple[list[str], list[torch.Tensor]]:
    """What `trained` gives without a mechanism."""
    with small_trainer(*DEPTH, *overrides) as trainer:
        return trained(trainer)


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_the_dense_run(name: str) -> None:
    dense = dense_run()
    with small_trainer(*DEPTH, *NEUTRAL[name]) as trainer:
        assert trainer.config.mechanisms
        assert same_bits(trained(trainer), dense)


@pytest.mark.parametrize("name", CASES)
def test_off_is_off_and_on_is_not(name: str) -> None:
    case = CASES[name]
    plain = [override for override in case.settings if not override.startswith("mechanisms.")]
    dense = dense_run(*plain)
    with small_trainer(*DEPTH, *case.settings, f"mechanisms.{name}=null") as trainer:
        assert not trainer.config.mechanisms and not trainer.plugins
        assert same_bits(trained(trainer), dense)
    with small_trainer(*DEPTH, *case.settings) as trainer:
        assert not same_bits(trained(trainer), dense)


@pytest.mark.parametrize("name", CASES)
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """And a fresh run starts from the weights of a dense one, or is refused in one line."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    settings = (*DEPTH, *CASES[name].settings)
    with small_trainer(*settings) as trainer:
        data = trainer_batches(trainer)
        train_step(trainer, data)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1, optimizer_steps=1))
        expected = trained(trainer)
    with small_trainer(*settings, "train.seed=7") as trainer:
        load_checkpoint(saved, trainer)
        assert same_bits(trained(trainer), expected)
    if CASES[name].like:
        return
    refused = pytest.raises(CheckpointError, match=rf"another model or optimizer: mechanisms\.{name} is ")
    with small_trainer(*settings, f"mechanisms.{name}=null") as trainer, refused:
        load_checkpoint(saved, trainer)


@pytest.mark.parametrize("name", OWN_CODE)
def test_starts_from_dense_weights_unless_it_gives_them_another_meaning(name: str, tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.restore import initial_state

    settings = (*DEPTH, *CASES[name].settings)
    with small_trainer(*settings, f"mechanisms.{name}=null") as trainer:
        saved = save_checkpoint(tmp_path / "dense", trainer, state=TrainState(step=1))
        dense = [parameter.detach().clone() for parameter in trainer.models[0].parameters()]
    with small_trainer(*settings, "train.seed=7", f"checkpoint.init_from={saved}") as trainer:
        mechanism = trainer.config.mechanisms[name]
        if mechanism.shapes_weights:
            with pytest.raises(
                CheckpointError, match=rf"mechanisms\.{name} .*gives weights another meaning"
            ) as refused:
                initial_state(trainer, [])
            assert "\n" not in str(refused.value)
            return
        drawn = {key: weight.detach().clone() for key, weight in own_weights(trainer, mechanism).items()}
        initial_state(trainer, [])
        own = own_weights(trainer, mechanism)
        assert own.keys() == drawn.keys() and all(torch.equal(own[key], drawn[key]) for key in drawn)
        others = [weight for key, weight in trainer.models[0].named_parameters() if key not in own]
        for weight, theirs in zip(others, dense, strict=True):
            assert torch.equal(weight, torch.where(weight == 0, 0, theirs))
        if mechanism.adds_modules:
            assert own
            return
        back = save_checkpoint(tmp_path / "back", trainer, state=TrainState(step=1))
    without = (*settings, f"mechanisms.{name}=null", f"checkpoint.init_from={back}", "checkpoint.densify=true")
    with small_trainer(*without) as trainer:
        initial_state(trainer, [])


def own_weights(trainer: Any, mechanism: Any) -> dict[str, torch.Tensor]:
    """Parameters of the modules that a mechanism adds."""
    names = trainer.models[0].named_parameters()
    return {key: weight for key, weight in names if set(key.split(".")) & set(mechanism.adds_modules)}


@pytest.mark.parametrize("name", CASES)
def test_plan_is_what_is_there(name: str) -> None:
    shape = (*DEPTH, "model.hidden_size=64", "model.vocab_size=256", "data.seq_length=64", "train.micro_batch_size=2")
    select_backend(cpu_kernels="plain")  # what is planned for
    try:
        with small_trainer(*shape, *CASES[name].settings) as trainer:
            real = step_bytes(trainer)
            for window in (plugin for plugin in trainer.plugins if hasattr(plugin, "masks")):
                real["weights"] += sum(weight.nbytes + mask.nbytes for weight, mask in window.masks.items())
            real["weights"] += sum(getattr(plugin, "window_bytes", 0) for plugin in trainer.plugins)
            grouped = (plugin.groups for plugin in trainer.plugins if hasattr(plugin, "groups"))
            rectangles = (part for groups in grouped for parts in groups.rectangles.values() for part in parts)
            real["optimizer"] += sum(part.ids.nbytes for part in rectangles)
            others = (model for plugin in trainer.plugins for model in plugin.companions())
            real["weights"] += sum(weight.nbytes for model in others for weight in model.parameters())
            real["activations"] += sum(getattr(plugin, "kept_bytes", 0) for plugin in trainer.plugins)
            state = [plugin.sharded_state(_sharded(trainer)) for plugin in trainer.plugins]
            real["optimizer"] += sum(leaf.data.nbytes for leaves in state for leaf in leaves.values())
            config, parameters = trainer.config, list(trainer.models[0].parameters())
    finally:
        select_backend(cpu_kernels="fast")
    count = ParameterTable.of(config).count()
    assert count.total == sum(weight.numel() for weight in parameters)
    if CASES[name].holds_zeros:
        assert count.total - count.live == sum(int((weight == 0).sum()) for weight in parameters)
    memory = rank_memory(layout_of(config, 1, transformer_engine=False), 0)
    planned = {**memory.parts(), "activations": memory.activations + memory.logits}
    for part, size in real.items():
        assert planned[part] == pytest.approx(size, rel=0.05), part


def _sharded(trainer: Any) -> Any:
    from sparsecod_megatron.checkpoint.native import model_sharded_state

    return model_sharded_state(trainer.models, trainer.groups)


@pytest.mark.parametrize("name", OWN_CODE)
def test_export_is_verified_or_refused(name: str, tmp_path: Path) -> None:
    """And what was exported is imported as the same run; a tensor of its own that is wrong is named."""
    from sparsecod_megatron.checkpoint.exported import export_checkpoint, verify_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.cli.import_ import run_config
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.seams.mechanism import Folds, Refused

    settings = (*DEPTH, *CASES[name].settings, *CASES[name].finished, "model.init_method_std=0.1")
    with small_trainer(*settings) as trainer:
        trained(trainer, 1)
        saved = save_checkpoint(tmp_path, trainer, state=TrainState(step=1))
        config = trainer.config
    way = config.mechanisms[name].export(config.model)
    if isinstance(way, Refused):
        with pytest.raises(ConversionError, match=re.escape(f"mechanisms.{name}: {way.reason}")):
            export_checkpoint(saved, tmp_path / "hf")
        return
    assert export_checkpoint(saved, tmp_path / "hf") is not None
    imported = run_config(open_source(tmp_path / "hf"), None)
    assert imported.mechanisms == ({} if isinstance(way, Folds) else config.mechanisms)
    own = () if isinstance(way, Folds) else way.tensors
    wrong, named = CASES[name].wrong, CASES[name].named
    for tensor in [tensor for tensor in own if tensor.hf == wrong] if wrong else own[1:2]:
        weights = load_file(tmp_path / "hf/model.safetensors")
        weights[tensor.hf] = weights[tensor.hf].roll(1, 0).clone() * 1.5
        save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
        found = verify_checkpoint(saved, config, tmp_path / "hf", exported_as=torch.float32, seq_length=16)
        with pytest.raises(
            ConversionError, match=re.escape(f"first tensor that differs: layer 1: {named or tensor.hf}")
        ):
            found.require()


@pytest.mark.parametrize("name", CASES)
def test_the_example_trains(name: str) -> None:
    """On a model of its own, made small: the loss falls."""
    path = Path(__file__).parents[3] / f"examples/configs/nano_{name}.yaml"
    small = ("model.num_layers=2", "model.vocab_size=64", "train.train_steps=30", "train.global_batch_size=4")
    small = (*small, "train.micro_batch_size=4", "data.seq_length=16", "schedule.lr_warmup_steps=2")
    config = load_config(path, [*small, "optimizer.lr=1e-2", *CASES[name].example], mechanisms=MECHANISMS)
    assert name in config.mechanisms
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        data = trainer_batches(trainer)
        losses = [train_step(trainer, data).loss for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", CASES)
def test_settings_are_read_as_every_section_is(name: str, tmp_path: Path) -> None:
    kind = MECHANISMS.settings_class(name)
    config = load_config(None, [*SMALL, *DEPTH, *CASES[name].settings], mechanisms=MECHANISMS)
    assert type(config.mechanisms[name]) is kind
    from sparsecod_megatron.config import save_config

    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", mechanisms=MECHANISMS) == config
    with pytest.raises(ConfigError, match=rf"unknown key 'mechanisms\.{name}\.stranger'"):
        load_config(None, [*SMALL, f"mechanisms.{name}.stranger=1"], mechanisms=MECHANISMS)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        for bound in ("minimum", "above"):
            if bound in item.metadata:
                below = item.metadata[bound] - (bound == "minimum")
                with pytest.raises(ConfigError, match=rf"mechanisms\.{name}\.{item.name}: {below}"):
                    load_config(None, [*SMALL, f"mechanisms.{name}.{item.name}={below}"], mechanisms=MECHANISMS)


def test_a_saved_run_keeps_the_meaning_of_its_former_key(tmp_path: Path) -> None:
    """What an earlier version wrote is read as what the key has become."""
    file = tmp_path / "config.yaml"
    file.write_text("model: {attention_output_gate: headwise}\nmechanisms: {topk_activation: {k: 3}}\n")
    saved = load_config(file, mechanisms=SAVED_MECHANISMS)
    assert saved.model.attention_output_gate == "none"
    assert list(saved.mechanisms) == ["topk_activation", "headwise_gate"]


def test_every_reader_of_a_run_knows_the_mechanisms() -> None:
    """A call of `load_config` that left them out would refuse the section."""
    package = Path(__file__).parents[3] / "sparsecod_megatron"
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in (call for call in calls if getattr(call.func, "id", "") == "load_config"):
            assert "mechanisms" in [argument.arg for argument in call.keywords], f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.topk_activaton.k=3"], "no such mechanism; did you mean 'topk_activation'"),
        (["mechanisms.headwise_gate=true"], "mechanisms.headwise_gate: True is not a section"),
        (["model.attention_output_gate=headwise"], "is a mechanism now; write `mechanisms: {headwise_gate: {}}`"),
        (
            ["mechanisms.headwise_gate={}", "model.attention_output_gate=elementwise"],
            "beside model.attention_output_gate=elementwise; keep one",
        ),
        (["mechanisms.topk_activation.k_per_layer=[1,2]"], "2 entries for model.num_layers=3; give one per layer"),
        (["mechanisms.sparse_weights.density=0", "model.num_layers=2"], "density: 0.0 is not above 0"),
        (["mechanisms.sparse_weights.density=1e-9"], "leaves no weight of"),
        (["mechanisms.sparse_weights={}", "optimizer.optimizer=muon"], "optimizer.optimizer: muon"),
        (["mechanisms.monarch.blocks=2", "optimizer.optimizer=muon"], "muon orthogonalises whole matrices"),
        (["mechanisms.monarch={blocks: 2, kinds: []}"], "monarch.kinds: names none"),
        (["mechanisms.sltrain.rank=33"], "mechanisms.sltrain.rank: 33, but qkv is [64, 32]; lower it"),
        (["mechanisms.sltrain={rank: 4, density: 0.01}"], "density: 0.01 leaves no number in a row of qkv"),
        (["mechanisms.sltrain.rank=4", "model.mup_base_hidden_size=16"], "model.mup_base_hidden_size: muP has no"),
        (
            ["mechanisms.monarch.blocks=2", "mechanisms.sltrain={rank: 4, kinds: [mlp_input]}"],
            "mechanisms.monarch.kinds: mlp_input has mechanisms.sltrain too; name each kind in one",
        ),
        *(
            (
                [f"mechanisms.sparse_ift={{form: {form}, kinds: [mlp_output]}}", f"mechanisms.{masks}={{}}"],
                f"sparse_ift.kinds: mlp_output has mechanisms.{masks} too, which masks weights by their values",
            )
            for form, masks in (("factorized", "rigl"), ("doped", "set"), ("doped", "random_groups"))
        ),
        (["mechanisms.monarch={blocks: 3, kinds: [mlp_input]}"], "blocks: 3 does not divide mlp_input [96, 32]"),
        (
            ["mechanisms.monarch={blocks: 2, kinds: [mlp_output]}", "parallel.tensor_model_parallel_size=4"],
            "blocks: 2 of mlp_output cannot be shared by 4 tensor-parallel ranks",
        ),
        (["mechanisms.engram.layers=[-1]"], "engram.layers: -1, but model.num_layers=3 has layers 0 … 2; correct it"),
        (["mechanisms.engram={heads: 3, width: 8}"], "mechanisms.engram.width: 8 is not divisible by heads=3; change"),
        (
            ["mechanisms.engram={heads: 4, width: 12}", "parallel.tensor_model_parallel_size=2"],
            "engram.width: 12 is not divisible by heads=4 × parallel.tensor_model_parallel_size=2",
        ),
        (["mechanisms.engram={}", "model.mup_base_hidden_size=16"], "muP has no rule for the memory of"),
        (["mechanisms.stem.layers=[3]"], "stem.layers: 3, but model.num_layers=3 has layers 0 … 2; correct it"),
        (["mechanisms.stem.layers=[1,1]"], "stem.layers: 1 is named 2 times; name it once"),
        (["mechanisms.stem.layers=[]"], "stem.layers: names no layer"),
        (["mechanisms.stem={}", "model.activation=relu"], "model.activation: relu has no up projection"),
        (["mechanisms.stem.layers=[1]", "model.num_moe_experts=2"], "stem.layers: 1 is a mixture of experts"),
        (
            ["mechanisms.stem={}", "mechanisms.monarch.blocks=2"],
            "mechanisms.monarch.kinds: mlp_input of layer 1 has mechanisms.stem too",
        ),
        (
            ["mechanisms.stem={}", "megatron.recompute_granularity=selective", "megatron.recompute_modules=[mlp]"],
            "megatron.recompute_modules: mlp is computed again without the token ids of mechanisms.stem",
        ),
        (["mechanisms.stem={}", "megatron.mtp_num_layers=1"], "megatron.mtp_num_layers"),
        (
            ["mechanisms.sparse_ift={form: doped, sparsity: 0.05, kinds: [qkv]}", "model.hidden_size=16"],
            "leaves nothing",
        ),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    assert "\n" not in str(refused.value)
