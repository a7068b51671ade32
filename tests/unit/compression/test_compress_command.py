"""`sparsecod compress` as a user types it, on a tiny model saved to disk."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.compression.compress import restore
from sparsecod_megatron.compression.registry import METHODS
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.evaluation.corpus import read_corpus
from sparsecod_megatron.models.loading import load_model, load_tokenizer
from tests.helpers.perplexity import perplexity
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import VOCAB_SIZE, tiny

SIZES = ["--samples", "6", "--held-out", "4", "--seq-length", "12", "--device", "cpu"]
modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt (the extra `modelopt`)"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", VOCAB_SIZE, 300)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_words(tiny("llama"), tmp_path_factory.mktemp("llama"))


@modelopt
def test_report_holds_what_the_written_model_scores(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "compressed"
    arguments = ["compress", "--model", str(llama), "--data", str(text), "--output", str(output), *SIZES]
    assert main([*arguments, "--method", "magnitude", "--set", "pattern=2:4"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((output / "compression.json").read_text(encoding="utf-8"))
    held_out = read_corpus(text, load_tokenizer(llama)).tokens[-4 * 12 - 1 :]
    for folder, name in ((llama, "before"), (output, "after")):
        scored = perplexity(load_model(folder, dtype="float32", device="cpu"), held_out, seq_length=12, batch_size=4)
        assert report[name]["loss"] == pytest.approx(scored.loss, abs=1e-6)
        assert report[name]["loss_low"] == pytest.approx(scored.loss_low, abs=1e-6)
        assert f"perplexity {name:6}  {math.exp(scored.loss):.3f} [" in shown
    change = {row["metric"]: row["value"] for row in report["differences"]}
    assert change["loss"] == pytest.approx(report["after"]["loss"] - report["before"]["loss"])
    assert report["settings"]["samples"] == 6 and report["settings"]["data"] == str(text)
    assert report["compressed_fraction"] == 1 and report["warnings"] == []
    assert {"torch", "transformers", "sparsecod_megatron"} == report["versions"].keys()
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj +2 +3,072 +50\.00%", shown)
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert modes == {output.stat().st_mode & 0o666}, "colleagues read some files and not others"
    written = (output / "model.safetensors").read_bytes()
    assert main([*arguments, "--method", "fp8"]) == 2
    assert "is not empty; give a new directory, or ask to overwrite it" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == written
    assert main([*arguments, "--method", "fp8", "--overwrite"]) == 0
    assert "modelopt" not in capsys.readouterr().err.lower()
    with pytest.raises(CheckpointError, match="8-bit weights for inference engines"):
        load_model(output / "engine", dtype="float32", device="cpu")


@modelopt
def test_eval_rounds_the_inputs_of_a_quantised_model(llama: Path, text: Path, tmp_path: Path) -> None:
    output, common = tmp_path / "compressed", ["--seq-length", "12", "--batch-size", "4", "--device", "cpu"]
    arguments = ["--model", str(llama), "--data", str(text), "--output", str(output), *SIZES]
    assert main(["compress", *arguments, "--method", "int8"]) == 0
    assert main(["eval", "--model", str(output), "--perplexity", str(text), *common]) == 0
    found = json.loads((output / "eval" / "results.json").read_text(encoding="utf-8"))["perplexity"]["loss"]
    model, corpus = load_model(output, dtype="float32", device="cpu"), read_corpus(text, load_tokenizer(output))
    losses = [perplexity(model, corpus.tokens, seq_length=12).loss]
    restore(model, output / "input_ranges.json")
    losses.append(perplexity(model, corpus.tokens, seq_length=12).loss)
    assert found == pytest.approx(losses[1], abs=1e-6) and abs(found - losses[0]) > 1e-4


def test_every_command_reads_a_class_of_ours(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed, evaluated, analysed and compressed again, with the numbers of the report."""
    output, again = tmp_path / "low_rank", tmp_path / "again"
    arguments = ["compress", "--data", str(text), *SIZES]
    low_rank = ["--method", "low_rank", "--set", "share=0.5", "layers=*.mlp.*"]
    assert main([*arguments, "--model", str(llama), "--output", str(output), *low_rank]) == 0
    shown = capsys.readouterr().out
    report = json.loads((output / "compression.json").read_text(encoding="utf-8"))
    assert report["settings"]["set"] == {"rank": None, "share": 0.5, "layers": "*.mlp.*"}
    assert report["versions"].keys() == {"torch", "transformers", "sparsecod_megatron"}
    counts = report["num_parameters"]
    assert counts["after"] < counts["before"] and f"{counts['after']:,} after" in shown
    assert "not among layers=*.mlp.*" in shown
    pruned = [*arguments, "--model", str(output), "--output", str(again), "--method", "magnitude"]
    assert main(pruned) == 0
    second = json.loads((again / "compression.json").read_text(encoding="utf-8"))
    assert second["before"]["loss"] == pytest.approx(report["after"]["loss"], abs=1e-6)
    held_out = read_corpus(text, load_tokenizer(again)).tokens[-4 * 12 - 1 :]
    scored = perplexity(load_model(again, dtype="float32", device="cpu"), held_out, seq_length=12, batch_size=4)
    assert second["after"]["loss"] == pytest.approx(scored.loss, abs=1e-6)
    analyzed = ["analyze", str(output), "--data", str(text), "--scores", "similarity", "--device", "cpu"]
    assert main([*analyzed, "--samples", "2", "--seq-length", "12", "--output", str(tmp_path / "analysis")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--model", str(llama), str(output), "--output", str(tmp_path / "x"), *low_rank]) == 2
    assert "--model: 2 given, and --method low_rank takes one; give one" in capsys.readouterr().err


@modelopt
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--method": "int4"}, f"--method int4: no such method; use {', '.join(METHODS)}"),
        ({"--method": "sparsegpt24"}, "--method sparsegpt24: is now --method sparsegpt --set pattern=2:4"),
        ({"--method": "fp8", "--set": "pattern=2:4"}, "--set pattern=2:4: --method fp8 has no settings; leave it out"),
        ({"--method": "wanda+cg+magnitude"}, "'magnitude' cannot follow a +; use dsnot, update, cg"),
        ({"--method": "fp8+cg"}, "--method fp8+cg: nothing can follow fp8"),
        ({"--method": "wanda+dsnot", "--set": "pattern=group:4"}, "dsnot moves weights out of groups of 4"),
        ({"--method": "wanda", "--set": "pattern=group:0"}, "pattern group:0: a group has two weights or more"),
        ({"--model": "absent"}, "absent: no such folder"),
        ({"--model": "{empty}"}, "no checkpoint"),
        ({"--data": "absent"}, "absent: no such text file"),
        ({"--samples": "1000"}, "need 12049; give more text"),
        ({"--samples": "0"}, "--samples 0: must be at least 1"),
        ({"--batch-size": "0"}, "--batch-size 0: must be at least 1"),
        ({"--model": "{odd}"}, "no linear layer was compressed: columns must be a multiple of 8"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    llama: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    places = {"empty": tmp_path / "empty", "odd": tmp_path / "odd"}
    places["empty"].mkdir()
    odd = {"hidden_size": 20, "intermediate_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1}
    if "{odd}" in changes.values():
        save_with_words(tiny("llama", **odd), places["odd"])
    output = tmp_path / "out"
    if "{odd}" in changes.values():
        changes = changes | {"--set": "pattern=4:8"}
    options = {"--model": str(llama), "--method": "magnitude", "--data": str(text), "--output": str(output)}
    options |= dict(zip(SIZES[::2], SIZES[1::2], strict=True))
    options |= {option: value.format(**places) for option, value in changes.items()}
    assert main(["compress", *(part for pair in options.items() for part in pair)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsecod compress: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not output.exists() and not list(tmp_path.glob(".out*"))


def test_without_modelopt_the_extra_is_named(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "modelopt" else found(name, *rest)
    )
    arguments = ["--model", str(llama), "--data", str(text), "--output", str(tmp_path / "out"), "--method", "fp8"]
    assert main(["compress", *arguments]) == 2
    assert "pip install 'sparsecod_megatron[modelopt]'" in capsys.readouterr().err
