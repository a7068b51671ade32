"""Distillation: its terms against autograd, a step against transformers, a teacher that is the student."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import CheckpointError, ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.distillation import terms
from tests.helpers.hf_models import write_llama
from tests.helpers.megatron import SMALL
from tests.helpers.training import small_trainer, trainer_batches

EPSILON = 2.0**-7
"""Of bf16: the distance from 1 to the next number."""
UNTIED = "model.untie_embeddings_and_output_weights=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape."""
    made = tmp_path_factory.mktemp("models")
    write_llama(made / "student", seed=1)
    write_llama(made / "teacher", seed=2)
    return made


def setting(teacher: Path | str, *, squarehead: float = 1.0, kl: float = 0.0, temperature: float = 1.0) -> str:
    values = f'teacher: "{teacher}", squarehead: {squarehead}, kl: {kl}, temperature: {temperature}'
    return f"mechanisms.distillation={{{values}}}"


@contextmanager
def student(folder: Path, *overrides: str) -> Iterator[Any]:
    """A trainer with the weights of `folder / student`."""
    select_backend()
    from sparsecod_megatron.hf.source import open_source
    from sparsecod_megatron.mechanisms.directory_shards import directory_shards
    from sparsecod_megatron.model import unwrap

    source = open_source(folder / "student")
    same = [f"model.{name}={getattr(source.model, name)}" for name in ("rotary_base", "layernorm_epsilon")]
    with small_trainer(UNTIED, *same, "optimizer.clip_grad=0", *overrides) as trainer:
        models = [unwrap(model) for model in trainer.models]
        for target, values in directory_shards(source, trainer.config, models, trainer.groups, key="student"):
            target.data.copy_(values)
        yield trainer


def naive_loss(ours: Any, theirs: Any, tokens: Tensor, labels: Tensor, kl: float, temperature: float) -> list[Tensor]:
    """Cross entropy, squarehead and kl of transformers' outputs, sequence by sequence."""
    cross = F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    layers = []
    for state, target in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        ratios = [
            (one - other).square().mean() / (other.square().mean() + EPSILON)
            for one, other in zip(state, target, strict=True)
        ]
        layers.append(torch.stack(ratios).mean())
    predicted = [F.log_softmax(output.logits.flatten(0, 1) / temperature, -1) for output in (ours, theirs)]
    divergence = F.kl_div(*predicted, reduction="batchmean", log_target=True) * temperature**2
    return [cross, torch.stack(layers).sum(), divergence]


@pytest.mark.parametrize(
    "extra", [(), ("data.reset_attention_mask=true", "data.reset_position_ids=true")], ids=["sequences", "packed"]
)
def test_a_step_is_that_of_plain_torch(folder: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Values and every gradient, against autograd through two models of transformers; in two micro-batches."""
    from transformers import AutoModelForCausalLM

    kl, temperature, squarehead = 0.5, 2.0, 0.7
    wanted = setting(folder / "teacher", squarehead=squarehead, kl=kl, temperature=temperature)
    with student(folder, wanted, *extra) as trainer:
        from sparsecod_megatron.hf.source import open_source
        from sparsecod_megatron.train.step import train_step

        batches = [batch for batch, _ in zip(trainer_batches(trainer)[0], range(2), strict=False)]
        result = train_step(trainer, trainer_batches(trainer))
        values = trainer.plugins[0].metrics(trainer.context(1))
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")
            for name in ("student", "teacher")
        )
        tokens, labels = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels"))
        outputs = [model(tokens, output_hidden_states=True) for model in (ours, theirs)]
        cross, states, divergence = naive_loss(*outputs, tokens, labels, kl, temperature)
        (cross + squarehead * states + kl * divergence).backward()
        assert result.loss == pytest.approx(cross.item(), rel=1e-5)
        assert values["distillation_squarehead"] == pytest.approx(states.item(), rel=1e-5)
        assert values["distillation_kl"] == pytest.approx(divergence.item(), rel=1e-4)
        # The gradients as if they were weights: the import brings them under our names.
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        shutil.copy(folder / "student/config.json", tmp_path)
        save_file(gradients, tmp_path / "model.safetensors", metadata={"format": "pt"})
        expected = dict(open_source(tmp_path).tensors())
        for name, parameter in trainer.models[0].module.named_parameters():
            torch.testing.assert_close(parameter.main_grad, expected[name], rtol=1e-3, atol=2e-6, msg=name)


def test_a_teacher_that_is_the_student_adds_nothing(folder: Path) -> None:
    """Both terms are zero, and the gradient is the plain run's bit for bit."""
    from sparsecod_megatron.train.step import train_step

    found = []
    for extra in ((), (setting(folder / "student", kl=2.0, temperature=3.0),)):
        with student(folder, *extra) as trainer:
            norm = train_step(trainer, trainer_batches(trainer)).grad_norm
            gradients = [parameter.main_grad.clone() for parameter in trainer.models[0].parameters()]
            found.append((norm, gradients))
            for plugin in trainer.plugins:
                assert plugin.metrics(trainer.context(1)) == {"distillation_squarehead": 0, "distillation_kl": 0}
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_learns_from_its_teacher(folder: Path) -> None:
    """And the teacher stays what it is."""
    from sparsecod_megatron.train.step import train_step

    with student(folder, setting(folder / "teacher", kl=1.0), "optimizer.lr=3e-3") as trainer:
        plugin, data = trainer.plugins[0], trainer_batches(trainer)
        before = [weight.clone() for model in plugin.teacher.models for weight in model.parameters()]
        values = []
        for step in range(1, 13):
            train_step(trainer, data)
            values.append(plugin.metrics(trainer.context(step)))
        after = [weight for model in plugin.teacher.models for weight in model.parameters()]
        assert all(map(torch.equal, before, after))
        assert not any(weight.requires_grad for weight in after)
    assert values[-1]["distillation_squarehead"] < 0.8 * values[0]["distillation_squarehead"]


def test_cast_with_its_dense_teacher(folder: Path) -> None:
    """The paper's combination: zeros in the end, and closer to the teacher than without it."""
    from sparsecod_megatron.mechanisms.weights.engine.patterns import exceeding_groups
    from sparsecod_megatron.train.step import train_step

    steps, found = 12, []
    cast = ("mechanisms.cast={decay: 1.0e-4, interval: 2}", f"train.train_steps={steps}", "optimizer.lr=3e-3")
    for factor in (1e-6, 3.0):
        with student(folder, *cast, setting(folder / "teacher", squarehead=0, kl=factor)) as trainer:
            trainer.optimizer.reload_model_params()
            data = trainer_batches(trainer)
            for _ in range(steps):
                train_step(trainer, data)
            values = {
                key: value for plugin in trainer.plugins for key, value in plugin.metrics(trainer.context(1)).items()
            }
            found.append(values["distillation_kl"])
            masks = next(plugin for plugin in trainer.plugins if plugin.name == "cast")
            assert not any(exceeding_groups(shard.parameter, 2, 4) for _, shard in masks.places.shards)
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize(("method", "layers"), [("uniform", 1), ("uniform", 3), ("block", 2)])
def test_recompute_changes_nothing(folder: Path, method: str, layers: int) -> None:
    from sparsecod_megatron.train.step import train_step

    again = [
        "megatron.recompute_granularity=full",
        f"megatron.recompute_method={method}",
        f"megatron.recompute_num_layers={layers}",
    ]
    norms = []
    for extra in ((), again):
        with student(folder, setting(folder / "teacher", kl=1.0), *extra) as trainer:
            norms.append(train_step(trainer, trainer_batches(trainer)).grad_norm.hex())
    assert norms[0] == norms[1]


def test_squarehead_is_the_gradient_of_its_value() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, 8, requires_grad=True), torch.randn(5, 3, 8)
    samples = torch.arange(3).expand(5, 3)
    weights = terms.inverse_squares(teacher, samples, 3, 5 * 8, ())
    value, gradient = terms.squarehead(student, teacher, weights)
    naive = sum(
        (student[:, one] - teacher[:, one]).square().sum() / (teacher[:, one].square().sum() + EPSILON * 40)
        for one in range(3)
    )
    naive.backward()
    torch.testing.assert_close(value, naive.detach())
    torch.testing.assert_close(gradient, student.grad)


def test_a_divergence_of_large_logits_is_finite() -> None:
    class Alone:
        def size(self) -> int:
            return 1

    student = torch.tensor([[[1000.0, 0.0]]])
    value, gradient = terms.kl_divergence(student, -student, 1.0, Alone())
    assert value == 1000 and torch.equal(gradient, torch.tensor([[[1.0, -1.0]]]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 128}, "has vocab_size 128, the run has model.vocab_size=64; they must agree"),
        ({"num_hidden_layers": 2}, "has num_layers 2, the run has model.num_layers=3; they must agree"),
        ({"hidden_size": 64}, "has hidden_size 64, the run has model.hidden_size=32; they must agree"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    refused_teacher(write_llama(tmp_path / "teacher", **change), words)


def test_a_teacher_that_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    refused_teacher(tmp_path / "nowhere", "has no config.json; give a HuggingFace model directory")
    shutil.copytree(folder / "teacher", tmp_path / "cut")
    weights = (tmp_path / "cut/model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(weights[:-100])
    refused_teacher(tmp_path / "cut", "damaged")
    shutil.copytree(folder / "teacher", tmp_path / "heads")
    config = json.loads((folder / "teacher/config.json").read_text())
    (tmp_path / "heads/config.json").write_text(json.dumps(config | {"num_attention_heads": 8, "head_dim": 4}))
    refused_teacher(tmp_path / "heads", "k_proj.weight: shape [16, 32], but the model")


def refused_teacher(directory: Path, words: str) -> None:
    refused = pytest.raises(ConfigError, match=rf"^mechanisms\.distillation\.teacher: .*{re.escape(words)}")
    with refused as error, small_trainer(UNTIED, setting(directory)):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.distillation={}"], "mechanisms.distillation.teacher: not set"),
        ([setting("x", squarehead=0)], "squarehead: 0, and mechanisms.distillation.kl=0 too"),
        ([setting("x"), "megatron.mtp_num_layers=1"], "megatron.mtp_num_layers"),
        ([setting("x", temperature=0)], "temperature: 0.0 is not above 0"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)


def test_another_teacher_does_not_resume(folder: Path, tmp_path: Path) -> None:
    """Whose files differ, at the same path; the weights alone start a run with it, and one without any."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.restore import initial_state

    place = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", place)
    with small_trainer(UNTIED, setting(place)) as trainer:
        saved = save_checkpoint(tmp_path / "steps", trainer, state=TrainState(step=1, optimizer_steps=0))
        load_checkpoint(saved, trainer)
    shutil.rmtree(place)
    shutil.copytree(folder / "student", place)
    with small_trainer(UNTIED, setting(place)) as trainer, pytest.raises(CheckpointError, match="other files than"):
        load_checkpoint(saved, trainer)
    for extra in ((setting(place),), ()):
        with small_trainer(UNTIED, f"checkpoint.init_from={saved}", *extra) as trainer:
            initial_state(trainer, [])
