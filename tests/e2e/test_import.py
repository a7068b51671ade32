"""`sparsecod import` of pretrained weights: back to the same files, trained on under every kind of parallelism."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from tests.helpers.cli import read_jsonl, sparsecod, sparsecod_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.dist]
PROMPTS = ("Once upon a time", "Lily and her mom", "Tom had a big", "The little dog", "One day, a bird")
LAYOUTS = {
    "tp2": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "pp2": ("parallel.pipeline_model_parallel_size=2",),
    "ep2": ("parallel.expert_model_parallel_size=2",),
}


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    """A small pretrained Llama with grouped queries."""
    folder = shared_data / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip("no shared/data/models/stories260K_hf beside the checkout")
    return folder


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its import."""
    folder = tmp_path_factory.mktemp("import") / "run"
    sparsecod("import", "--hf", stories, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def prefix(stories: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model itself says, as training data."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    folder = tmp_path_factory.mktemp("text")
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=250, do_sample=False)
        (folder / f"{index}.txt").write_text(tokenizer.decode(said[0], skip_special_tokens=True))
    tokens = folder / "tokens"
    sparsecod("data", "--input", folder, "--tokenizer", run / "tokenizer", "--output", tokens, "--val-fraction", "0.2")
    return tokens


def losses(run: Path, prefix: Path, output: Path, *overrides: str, nproc: int = 1) -> list[float]:
    """Two steps from the imported weights."""
    options = (
        f"checkpoint.init_from={run}",
        f"data.prefix={prefix}",
        f"logging.run_dir={output}",
        "data.seq_length=64",
        "precision.dtype=fp32",
        "train.train_steps=2",
        "train.global_batch_size=4",
        "train.eval_interval=0",
        "optimizer.lr=1e-3",
    )
    sparsecod_ranks("train", run / "config.yaml", *options, *overrides, nproc=nproc)
    return [record["loss"] for record in read_jsonl(output / "metrics.jsonl")]


def test_the_import_exports_to_the_files_it_came_from(stories: Path, run: Path, tmp_path: Path) -> None:
    output = sparsecod("export", "--checkpoint", run, "--output", tmp_path / "hf").stdout
    assert output.count("argmax agreement 100.00%") == 2
    expected, found = (load_file(folder / "model.safetensors") for folder in (stories, tmp_path / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(PROMPTS[0], return_tensors="pt").input_ids
    texts = [
        AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=60, do_sample=False).tolist()
        for folder in (stories, tmp_path / "hf")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_training_goes_on_under_tensor_parallelism(run: Path, prefix: Path, tmp_path: Path) -> None:
    single = losses(run, prefix, tmp_path / "single")
    spread = losses(run, prefix, tmp_path / "tp2", *LAYOUTS["tp2"], nproc=2)
    # Its own greedy words: far below ln(512) = 6.2, which a fresh model has.
    assert single[0] < 2.5
    assert all(math.isfinite(loss) for loss in single)
    assert spread == pytest.approx(single, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "ep2"])
def test_layouts_compute_the_imported_model(layout: str, prefix: Path, tmp_path: Path) -> None:
    """Random models of transformers, of layers and experts that two processes can share."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    sparsecod("import", "--hf", tmp_path / "hf", "--output", tmp_path / "run")
    single = losses(tmp_path / "run", prefix, tmp_path / "single")
    spread = losses(tmp_path / "run", prefix, tmp_path / layout, *LAYOUTS[layout], nproc=2)
    assert spread == pytest.approx(single, rel=1e-5)


def test_mistakes_are_one_line(stories: Path, tmp_path: Path) -> None:
    cases = {
        "has no config.json": ("--hf", tmp_path, "--output", tmp_path / "out"),
        "no such file": ("--hf", stories, "--output", tmp_path / "out", "--config", tmp_path / "absent.yaml"),
    }
    for message, arguments in cases.items():
        result = sparsecod("import", *arguments, check=False)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    assert not (tmp_path / "out").exists()
