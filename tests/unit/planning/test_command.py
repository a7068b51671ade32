"""`sparsecod plan` as a user starts it: tables, JSON, and refusals of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import sparsecod

DENSE, MOE = "examples/configs/dense_1B.yaml", "examples/configs/moe_1B_7B.yaml"


def refusal(*arguments: str | Path) -> str:
    result = sparsecod("plan", *arguments, check=False)
    assert result.returncode == 2, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_dense(tmp_path: Path) -> None:
    output = tmp_path / "new" / "plan.json"
    text = sparsecod("plan", DENSE, "--gpus", "16", "--output", output).stdout
    assert "1,279,854,592" in text
    assert "data 16" in text
    plan = json.loads(output.read_text())
    assert not list(output.parent.glob("*.tmp"))
    (memory,) = plan["memory_bytes"]
    parameters = plan["parameters"]["total"]
    assert memory["weights"] == 2 * parameters
    assert memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 12 * parameters // 16
    assert plan["gathered_bytes"] == [12 * parameters]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert plan["flops_per_token"]["full"] > plan["flops_per_token"]["causal"]
    kept = plan["activation_bytes_by_recompute"]
    assert kept["full"] < kept["selective"] <= kept["none"]
    assert plan["step"]["seconds"]["best"] < plan["step"]["seconds"]["worst"]
    assert f"{memory['total'] / 2**30:.2f}" in text


def test_tables_that_tokens_look_up() -> None:
    """Of V · F numbers: 18 bytes each in bf16, 12 of them over 2 ranks; 6 of each sent but for a rank's own half."""
    overrides = ["model.vocab_size=4096", "mechanisms.stem.layers=[1]", "precision.dtype=bf16", "optimizer.lr=1e-3"]
    text = sparsecod("plan", "examples/configs/nano_stem.yaml", "--gpus", "2", *overrides).stdout
    numbers = 4096 * 512
    cost = f"{numbers * 12 / 2**30:.2f} GiB of a rank with gradients and optimizer, {numbers * 3 / 2**30:.2f} GiB sent"
    assert f"looked up    {numbers:,} in tables, of which a token reads 512: {cost} in a step" in text


def test_experts(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    result = sparsecod("plan", MOE, "parallel.pipeline_model_parallel_size=2", "--gpus", "16", "--output", output)
    assert "stage 0" in result.stdout
    assert "stage 1" in result.stdout
    plan = json.loads(output.read_text())
    assert len(plan["memory_bytes"]) == len(plan["sent_bytes"]) == 2
    assert {"expert", "pipeline", "data"} <= set(plan["sent_bytes"][0])
    assert plan["layout"]["expert_data_parallel_size"] == 1


def test_search(tmp_path: Path) -> None:
    output = tmp_path / "layouts.json"
    text = sparsecod("plan", MOE, "--gpus", "16", "--gpu", "h200", "--search", "--output", output).stdout
    layouts = json.loads(output.read_text())["layouts"]
    assert f"{len(layouts)} layouts fit" in text
    for override in layouts[0]["overrides"]:
        assert override in text


def test_vocabulary_that_is_not_set() -> None:
    text = sparsecod("plan", DENSE, "model.vocab_size=null", "--gpus", "8").stdout
    assert "note: model.vocab_size is not set" in text
    assert "50304" in text
    assert "1,279,854,592" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tensor_model_parallel_size=3", "--gpus", "8"], "model.num_attention_heads: 16 is not divisible"),
        (["parallel.pipeline_model_parallel_size=4", "--gpus", "6"], "does not divide 6 processes"),
        (["--gpus", "7"], "train.global_batch_size: 1024 is not a multiple"),
        (
            ["model.vocab_size=null", "data.prefix=data/nothing", "--gpus", "8"],
            "data.prefix: data/nothing: there is no",
        ),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["megatron.recompute_granularity=full", "--gpus", "8"], "megatron.recompute_method is not set"),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "megatron.num_layers_in_first_pipeline_stage=3",
                "--gpus",
                "8",
            ],
            "divides layers evenly",
        ),
        (
            ["model.num_layers=64", "model.hidden_size=8192", "train.micro_batch_size=1", "--gpus", "8"],
            "a rank of pipeline stage 0 needs",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    assert message in refusal(DENSE, *arguments, "--output", output)
    assert not output.exists()


def test_what_does_not_fit_names_the_largest_part() -> None:
    line = refusal(DENSE, "train.micro_batch_size=128", "--gpus", "8")
    assert "the largest part is activations" in line
    assert "lower train.micro_batch_size" in line


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = refusal(DENSE, "--gpus", "8", "--output", tmp_path / "file" / "plan.json")
    assert "is a file; give a path in a folder" in refused
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refusal(DENSE, "--gpus", "8", "--output", tmp_path / "folder" / "..")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
