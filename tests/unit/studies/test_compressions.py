"""Tables of compressions: every number again from the directories, rows that are kept, and blocks that are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.evaluation.corpus import read_corpus
from sparsecod_megatron.models.loading import load_model, load_tokenizer
from sparsecod_megatron.studies.compressions import make_cells
from sparsecod_megatron.studies.peak_memory import peak_memory
from tests.helpers.perplexity import perplexity
from tests.helpers.words import save_with_words, write_words
from tests.unit.compression.models import VOCAB_SIZE, sequences, tiny

SIZES = ["--samples", "6", "--held-out", "5", "--seq-length", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", VOCAB_SIZE, 300)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_words(tiny("llama"), tmp_path_factory.mktemp("llama"))


def test_the_table_is_of_the_directories_beside_it(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table"
    command = ["compress", "--model", str(llama), "--data", str(text), "--output", str(output), *SIZES]
    command += ["--method", "magnitude,wanda+cg", "--pattern", "2:4,0.7", "--scores", "causal"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    table = json.loads((output / "table.json").read_text(encoding="utf-8"))
    names = [(row["method"], row["pattern"]) for row in table["rows"]]
    assert names == [("dense", ""), *((method, p) for method in ("magnitude", "wanda+cg") for p in ("2:4", "0.7"))]
    held_out, dense_loss = read_corpus(text, load_tokenizer(llama)).tokens[-5 * 12 - 1 :], None
    for row in table["rows"]:
        folder = llama if row["method"] == "dense" else output / f"{row['method']}_{row['pattern'].replace(':', '-')}"
        model = load_model(folder, dtype="float32", device="cpu")
        scored = perplexity(model, held_out, seq_length=12, batch_size=4)
        assert row["perplexity"]["loss"] == pytest.approx(scored.loss, abs=1e-6)
        weights = list(model.parameters())
        assert row["nonzero_parameters"] == sum(int((weight != 0).sum()) for weight in weights)
        assert row["bytes"] == 4 * row["num_parameters"] == 4 * sum(weight.numel() for weight in weights)
        if dense_loss is None:
            dense_loss = scored.loss
            continue
        matrices = [weight for _, weight in eligible(model)]
        zeros = sum(int((weight == 0).sum()) for weight in matrices) / sum(weight.numel() for weight in matrices)
        assert row["zeros"] == pytest.approx(zeros) and row["seconds"] > 0 and row["peak_memory_bytes"] > 2**20
        assert row["loss_change"] == pytest.approx(scored.loss - dense_loss, abs=1e-6) and row["loss_change_stderr"] > 0
        report = json.loads((folder / "compression.json").read_text(encoding="utf-8"))
        errors = {matrix["name"]: matrix["output_error"] for matrix in report["matrices"]}
        assert row["output_error"]["worst"] == max(errors.values()) == errors[row["output_error"]["worst_matrix"]]
        assert row["output_error"]["mean"] == pytest.approx(sum(errors.values()) / len(errors))
        assert {entry["score"] for entry in row["scores"]} == {"causal"}
    # By rows 22 of 32 and 34 of 48 columns go, 69.17 % in all, where 70 % of a whole matrix can.
    unequal = [line for line in shown.splitlines() if line.startswith("warning: pattern ")]
    assert len(unequal) == 1 and unequal[0].endswith("zeros of magnitude 69.99%, wanda+cg 69.17%")
    with (output / "table.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    losses = [float(line["value"]) for line in lines if line["metric"] == "loss"]
    assert losses == [row["perplexity"]["loss"] for row in table["rows"]]
    assert any(line["metric"].startswith("causal/") and line["low"] for line in lines)
    assert (output / "table.md").read_text(encoding="utf-8") in shown and not (output / ".work").exists()
    check_that_rows_are_kept(command, output, table)


def check_that_rows_are_kept(command: list[str], output: Path, table: dict[str, object]) -> None:
    """The same command again makes what is missing and nothing else; another seed is another row."""
    kept, missing = output / "magnitude_2-4", output / "wanda+cg_0.7"
    before = (kept / "model.safetensors").stat().st_mtime_ns
    (output / "rows" / f"{missing.name}.json").unlink()
    assert main([*command, "--overwrite"]) == 0
    again = json.loads((output / "table.json").read_text(encoding="utf-8"))
    for old, new in zip(table["rows"], again["rows"], strict=True):  # type: ignore[call-overload]
        assert {**new, "seconds": 0, "peak_memory_bytes": 0} == {**old, "seconds": 0, "peak_memory_bytes": 0}
    assert (kept / "model.safetensors").stat().st_mtime_ns == before
    assert main([*command, "--seed", "1", "--overwrite"]) == 0
    assert (kept / "model.safetensors").stat().st_mtime_ns > before


def test_nothing_but_the_table_is_written_where_models_are_not_kept(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    command = ["compress", "--model", str(llama), "--data", str(text), "--output", str(output), *SIZES]
    assert main([*command, "--method", "low_rank,wanda", "--set", "share=0.5", "--keep", "none"]) == 0
    assert {path.name for path in output.iterdir()} == {"rows", "table.md", "table.csv", "table.json"}
    rows = json.loads((output / "table.json").read_text(encoding="utf-8"))["rows"]
    assert [row["pattern"] for row in rows] == ["", "", "0.5"] and rows[1]["output_error"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "wanda,wanda"], "wanda_0.5 stands twice"),
        (["--method", "low_rank,fp8", "--pattern", "0.5"], "--method low_rank,fp8 has none"),
        (["--method", "wanda,obs", "--set", "rank=3"], "none of wanda, obs has this setting"),
        (["--method", "wanda,obs", "--scores", "sorcery"], "sorcery"),
        (["--method", ","], "names none"),
        (["--method", "wanda", "--pattern", "5"], "pattern 5: give the share"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    changes: list[str], message: str, llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra `modelopt`)")
    output = tmp_path / "out"
    assert (
        main(["compress", "--model", str(llama), "--data", str(text), "--output", str(output), *SIZES, *changes]) == 2
    )
    assert message in capsys.readouterr().err and not output.exists()


def test_settings_go_where_they_belong() -> None:
    cells = make_cells(["wanda", "low_rank"], ["0.5", "2:4"], ["per=matrix", "rank=3"])
    assert [cell.name for cell in cells] == ["wanda_0.5", "wanda_2-4", "low_rank"]
    assert [getattr(cell.method.settings, "per", None) for cell in cells] == ["matrix", None, None]
    assert cells[2].method.settings.rank == 3


@pytest.mark.parametrize("settings", [["inputs=dense"], ["order=true"], ["allocation=influence"]])
def test_a_run_that_ended_after_a_block_continues_there(settings: list[str], tmp_path: Path) -> None:
    def run(work: Path | None) -> torch.nn.Module:
        model, method = tiny("mixtral"), find_method("sparsegpt+cg", settings)
        result = compress(model, method, sequences(), batch_size=4, work=work)
        reports.append(([row.output_error for row in result.matrices], result.warnings))
        return result.model

    reports: list[tuple[list[float | None], list[str]]] = []
    whole = run(None)
    run(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["block_0000.safetensors", "block_0001.safetensors"]
    files[1].unlink()
    first = files[0].stat().st_mtime_ns
    continued = run(tmp_path)
    assert files[0].stat().st_mtime_ns == first and files[1].is_file()
    assert reports[0] == reports[1] == reports[2] and reports[0][1]
    for (name, weight), other in zip(whole.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(weight, other), name
    files[0].write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"block_0000\.safetensors: cannot be read"):
        run(tmp_path)


def test_the_peak_is_that_of_the_work_alone() -> None:
    large = torch.ones(64 * 2**20, dtype=torch.uint8)
    del large
    with peak_memory(torch.device("cpu")) as idle:
        pass
    with peak_memory(torch.device("cpu")) as busy:
        torch.ones(128 * 2**20, dtype=torch.uint8).sum()
    assert busy.num_bytes - idle.num_bytes > 100 * 2**20
