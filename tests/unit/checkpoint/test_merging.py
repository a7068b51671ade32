"""A mean of checkpoints is what a run would be whose updates had followed the curve; it exports; mistakes are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend

BACKEND = select_backend()

from sparsecod_megatron.checkpoint.decay_curves import coefficients  # noqa: E402
from sparsecod_megatron.checkpoint.merging import BIAS_SUFFIX  # noqa: E402
from sparsecod_megatron.checkpoint.stream import streamed_checkpoint  # noqa: E402
from sparsecod_megatron.cli.main import main  # noqa: E402
from tests.helpers.training import small_trainer, trainer_batches  # noqa: E402

SIGMOID = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_bias_update_rate=0.1",
)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_coefficients_are_those_of_the_curves(count: int) -> None:
    assert coefficients("linear", count) == pytest.approx([1 / count] * count)
    for curve, left in (
        ("cosine", lambda share: 0.5 + 0.5 * math.cos(math.pi * share)),
        ("1-sqrt", lambda share: 1 - share**0.5),
    ):
        found = coefficients(curve, count)
        assert sum(found) == pytest.approx(1) and min(found) > 0
        # Updates between checkpoints i - 1 and i are in all means from i on.
        assert [sum(found[i:]) for i in range(1, count)] == pytest.approx([left(i / count) for i in range(1, count)])


def saved_steps(folder: Path, *overrides: str, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """A run's checkpoints of its first steps, and the fp32 weights of each."""
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    found = []
    with small_trainer(*overrides) as trainer:
        data = trainer_batches(trainer)
        for step in range(1, steps + 1):
            train_step(trainer, data)
            save_checkpoint(folder / "checkpoints", trainer, state=TrainState(step=step, optimizer_steps=step))
            module = trainer.models[0]
            own = {name.split("module.")[-1]: tensor for name, tensor in module.named_parameters()}
            masters = {
                name: getattr(tensor, "main_param", tensor).detach().float().view(tensor.shape).clone()
                for name, tensor in own.items()
            }
            biases = {
                name.split("module.")[-1]: tensor.clone()
                for name, tensor in module.named_buffers()
                if name.endswith(BIAS_SUFFIX)
            }
            found.append(masters | biases)
    return found


@pytest.mark.parametrize("overrides", [(), SIGMOID, ("precision.dtype=bf16",)], ids=["fp32", "experts", "bf16"])
def test_the_mean_is_of_fp32_weights(overrides: tuple[str, ...], tmp_path: Path) -> None:
    states = saved_steps(tmp_path / "run", *overrides)
    arguments = ["merge", str(tmp_path / "run"), "--last", "3", "--curve", "cosine", "--output", str(tmp_path / "mean")]
    assert main(arguments) == 0
    weights = coefficients("cosine", 3)
    with streamed_checkpoint(tmp_path / "mean") as source:
        assert set(source.tensors) == states[-1].keys()
        for name, tensor in source.tensors.items():
            mean = sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True))
            expected = states[-1][name] if name.endswith(BIAS_SUFFIX) else mean.float()
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    told = json.loads((tmp_path / "mean/merge.json").read_text())
    assert [entry["coefficient"] for entry in told["checkpoints"]] == weights
    if not overrides:
        assert main(["export", "--checkpoint", str(tmp_path / "mean"), "--output", str(tmp_path / "hf")]) == 0


MISTAKES = {
    "a mean needs at least two different": [],
    "has 2 checkpoints in checkpoints/, but --last is 5": ["--last", "5"],
    "a mean needs at least 2 checkpoints": ["--last", "1"],
}


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_steps(tmp_path / "run", steps=2)
    saved_steps(tmp_path / "other", "model.ffn_hidden_size=24", steps=1)
    saved_steps(tmp_path / "masked", "mechanisms.sparse_weights.density=0.5", steps=2)
    cases = {message: [str(tmp_path / "run"), *arguments] for message, arguments in MISTAKES.items()}
    cases["model.ffn_hidden_size is"] = [str(tmp_path / "other"), str(tmp_path / "run")]
    cases["mechanisms.sparse_weights keeps masks there"] = [str(tmp_path / "masked"), "--last", "2"]
    for message, arguments in cases.items():
        assert main(["merge", *arguments, "--output", str(tmp_path / "mean")]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
        assert not (tmp_path / "mean").exists()
