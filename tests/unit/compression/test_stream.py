"""Compression with one block in memory: the files of the run that holds the model, also after it was killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.scores.registry import LOOKING_AT_ALL_WEIGHTS, SCORES, find_scores
from sparsecod_megatron.cli.main import main
from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError, ConversionError
from sparsecod_megatron.models.loading import load_model, stream_model
from sparsecod_megatron.parallel.processes import Processes
from tests.helpers.decoders import VOCAB_SIZE, tiny_decoder
from tests.helpers.questions import random_items
from tests.helpers.streaming import streaming_outcome, tensors
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import sequences, tiny

SIZES = ["--samples", "6", "--held-out", "5", "--seq-length", "12", "--device", "cpu"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied llama": lambda: tiny("llama", num_hidden_layers=3),
    "own class with experts": lambda: tiny("sparsecod"),
    "qwen3_moe": lambda: tiny_decoder("qwen3_moe"),
    "gpt2": lambda: tiny_decoder("gpt2"),
    "gpt_neox": lambda: tiny_decoder("gpt_neox"),
    "deepseek_v3": lambda: tiny_decoder("deepseek_v3"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", VOCAB_SIZE, 300)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_words(tiny("llama", num_hidden_layers=3), tmp_path_factory.mktemp("llama"))


def run(model: Path, text: Path, output: Path, *extra: str) -> None:
    method = [] if "--method" in extra else ["--method", "sparsegpt+cg"]
    command = ["compress", "--model", str(model), "--data", str(text), "--output", str(output), *SIZES, *method, *extra]
    assert main(command) == 0


def check_same_files(whole: Path, streamed: Path) -> None:
    """All but the files of weights byte for byte, and these tensor for tensor."""
    first, second = (
        {path.name for path in folder.iterdir() if "model" not in path.name} for folder in (whole, streamed)
    )
    assert first == second and {"config.json", "tokenizer.json", "compression.json"} <= first
    for name in first:
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name
    ours, theirs = tensors(streamed), tensors(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("family", MODELS)
def test_the_directory_is_that_of_the_whole_model(family: str, text: Path, tmp_path: Path) -> None:
    """Report included, with its perplexities before and after, errors of weights and outputs, and shares of zeros."""
    model = save_with_words(MODELS[family](), tmp_path / "model")
    (model / "modeling_of_its_own.py").write_text("# comes along\n")
    for name, extra in (("whole", ()), ("streamed", ("--stream",))):
        run(model, text, tmp_path / name, *extra)
    check_same_files(tmp_path / "whole", tmp_path / "streamed")
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    held = tensors(tmp_path / "streamed")
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "extra",
    [
        ("--method", "wanda", "--set", "order=true"),
        ("--method", "wanda+dsnot", "--set", "inputs=dense", "allocation=influence"),
        ("--method", "magnitude", "--set", "output_error=false"),
        ("--dtype", "bfloat16"),
    ],
)
def test_every_way_through_the_model_streams(extra: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    """From shards that blocks do not fit, and from float32 files into bfloat16."""
    source, model = MODELS["qwen3_moe"](), tmp_path / "model"
    save_with_words(source, model)
    (model / "model.safetensors").unlink()
    source.save_pretrained(model, max_shard_size="20KB")
    assert len(list(model.glob("*.safetensors"))) > 4
    run(model, text, tmp_path / "whole", *extra)
    run(model, text, tmp_path / "streamed", "--stream", *extra)
    check_same_files(tmp_path / "whole", tmp_path / "streamed")


def test_a_table_has_the_rows_of_the_whole_model(llama: Path, text: Path, tmp_path: Path) -> None:
    """Depth scores and their directories too."""
    rows, asked = {}, ("--method", "wanda,magnitude", "--pattern", "2:4", "--scores", "usefulness")
    for name, extra in (("whole", ()), ("streamed", ("--stream",))):
        run(llama, text, tmp_path / name, *asked, *extra)
        table = json.loads((tmp_path / name / "table.json").read_text())["rows"]
        rows[name] = [{**row, "seconds": 0, "peak_memory_bytes": 0} for row in table]
    assert rows["whole"] == rows["streamed"] and len(rows["whole"][1]["scores"]) == 1
    for row in ("dense", "wanda_2-4", "magnitude_2-4"):
        ours, theirs = (tmp_path / name / "analysis" / row for name in ("streamed", "whole"))
        assert (ours / "scores.json").read_bytes() == (theirs / "scores.json").read_bytes()
    check_same_files(tmp_path / "whole" / "wanda_2-4", tmp_path / "streamed" / "wanda_2-4")


def test_one_block_is_in_memory_at_a_time(llama: Path, tmp_path: Path) -> None:
    where = stream_model(llama, dtype="float32", device="cpu", scratch=tmp_path)
    blocks, seen = list(where.model.model.layers), []

    def note(layer: int, *_: object) -> None:
        seen.append((layer, [all(weight.device.type == "cpu" for weight in block.parameters()) for block in blocks]))

    for layer, block in enumerate(blocks):
        block.mlp.register_forward_hook(partial(note, layer))
    compress(where.model, find_method("sparsegpt+cg"), sequences(), batch_size=4, work=tmp_path, residency=where)
    assert len(seen) > 2 * len(blocks)
    assert all(there == [layer == other for other in range(len(blocks))] for layer, there in seen)
    assert all(weight.device.type == "meta" for block in blocks for weight in block.parameters())
    assert dict(where.named_parameters()).keys() == dict(where.model.named_parameters()).keys()


def test_a_killed_run_continues_and_leaves_nothing_half(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_with_words(tiny("llama", num_hidden_layers=24), tmp_path / "model")
    run(model, text, tmp_path / "whole")
    output, work = tmp_path / "streamed", tmp_path / ".streamed.work"
    child = os.fork()
    if not child:
        run(model, text, output, "--stream")
        os._exit(0)
    while not list(work.glob("*/block_0003.safetensors")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not output.exists()
    done = sorted(work.glob("*/block_*.safetensors"))
    assert 4 <= len(done) < 24
    kept = done[2].read_bytes()
    done[2].write_bytes(b"half")
    command = ["compress", "--model", str(model), "--data", str(text), "--output", str(output), *SIZES, "--stream"]
    assert main([*command, "--method", "sparsegpt+cg"]) == 2
    assert "block_0002.safetensors: cannot be read" in capsys.readouterr().err, "blocks that are done are not read"
    done[2].write_bytes(kept)
    run(model, text, output, "--stream")
    check_same_files(tmp_path / "whole", output)
    assert not list(tmp_path.glob(".*"))


def test_a_block_is_written_once_its_change_is_whole(llama: Path, tmp_path: Path) -> None:
    where = stream_model(llama, dtype="float32", device="cpu", scratch=tmp_path)
    where.begin(tmp_path / "changed", Processes())
    name = "model.layers.1.mlp.up_proj.weight"

    def change(fails: bool) -> None:
        with torch.no_grad(), where.holding(name):
            where.model.get_parameter(name).zero_()
            where.changed(name)
            assert not fails, "the method fails"

    with pytest.raises(AssertionError, match="the method fails"):
        change(True)
    assert not list(tmp_path.iterdir())
    with where.holding(name):
        assert bool(where.model.get_parameter(name).any())
    change(False)
    assert [path.name for path in (tmp_path / "changed").iterdir()] == ["model.layers.1"]
    with where.holding(name):
        assert not bool(where.model.get_parameter(name).any())
        assert bool(where.model.get_parameter("model.layers.1.mlp.gate_proj.weight").any())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--method", "gblm"), "--stream: --method gblm needs the whole model at once; leave --stream out"),
        (("--method", "wanda,welore"), "--stream: --method welore needs the whole model at once"),
        (
            ("--method", "wanda", "--scores", "causal,weights"),
            "--stream: --scores weights looks at the weights of all blocks at once; leave one out",
        ),
        (("--method", "wanda", "--scores", "activation"), "--stream: --scores activation looks at the weights of all"),
    ],
)
def test_what_cannot_stream_is_refused_in_one_line(
    extra: tuple[str, ...], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", "--model", str(tmp_path / "absent"), "--data", str(text), "--output", str(tmp_path / "out")]
    assert main([*command, "--stream", *extra]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "said"),
    [("jamba", ""), ("bloom", ""), ("zamba", "is tied to another weight, so its block is not on its own")],
)
def test_other_structures_stream_as_whole_or_are_refused(family: str, said: str, tmp_path: Path) -> None:
    """Blocks with states, and blocks that share weights. All families: tools/sweep_decoders.py --stream."""
    found = streaming_outcome(family, tmp_path)
    assert found is not None and said in found and bool(said) == bool(found)


def test_directories_that_cannot_be_taken_apart_are_refused(llama: Path, tmp_path: Path) -> None:
    def copy(name: str, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(json.dumps(json.loads((llama / "config.json").read_text()) | config))
        return folder

    lacking = copy("lacking")
    held = load_file(lacking / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, lacking / "model.safetensors", metadata={"format": "pt"})
    where = stream_model(lacking, dtype="float32", device="cpu", scratch=tmp_path)
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, the first model\.layers\.1\.mlp\.up_proj\.weight"):
        where.model(sequences(1))
    wide = copy("wide", intermediate_size=52)
    with (
        pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.\w+\.weight does not have the shape"),
        (where := stream_model(wide, dtype="float32", device="cpu", scratch=tmp_path)).holding("model.layers.0"),
    ):
        pass
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="only safetensors are read here"):
        stream_model(pickled, dtype="float32", device="cpu", scratch=tmp_path)
    with pytest.raises(ConversionError, match="holds quantised weights"):
        stream_model(
            copy("quantised", quantization_config={"quant_method": "fp8"}),
            dtype="float32",
            device="cpu",
            scratch=tmp_path,
        )


@pytest.mark.parametrize("score", sorted(set(SCORES) - set(LOOKING_AT_ALL_WEIGHTS)))
def test_scores_that_only_call_blocks_are_those_of_the_whole_model(score: str, tmp_path: Path) -> None:
    sizes = {"num_samples": 2, "seq_length": 256} if score == "seer_gate" else {"num_samples": 4, "seq_length": 12}
    source = tiny_decoder("qwen3_moe") if score == "experts" else tiny("llama", max_position_embeddings=512)
    source.save_pretrained(tmp_path)
    tokens = sequences(16, 64).flatten() % VOCAB_SIZE
    where = stream_model(tmp_path, dtype="float32", device="cpu", scratch=tmp_path)
    found = []
    for model in (load_model(tmp_path, dtype="float32", device="cpu"), where.model):
        context = make_context(model, tokens, seed=0, items=random_items(VOCAB_SIZE), **sizes)
        found.append(find_scores([score])[0].run(context))
    assert repr(found[0]) == repr(found[1])
    assert all(weight.device.type == "meta" for weight in where.model.model.layers.parameters())
