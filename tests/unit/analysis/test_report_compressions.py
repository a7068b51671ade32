"""Tables of compressions in the report and as a figure: what `compress` found is what they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from sparsecod_megatron.analysis.compression_plot import NORMAL_95, scores_by_sparsity
from sparsecod_megatron.analysis.compressions import load_compressions
from sparsecod_megatron.analysis.depth_left import shares_left, usefulness_left
from sparsecod_megatron.cli.main import main
from tests.helpers.words import save_with_words, write_words
from tests.unit.analysis.run_files import write_run
from tests.unit.analysis.test_report import Page
from tests.unit.compression.models import VOCAB_SIZE, tiny

METHODS, PATTERNS = ("magnitude", "wanda+cg"), ("0.3", "0.6", "2:4")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command writes it, of a tiny model."""
    folder = tmp_path_factory.mktemp("compressions")
    model = save_with_words(tiny("llama"), folder / "model")
    text = write_words(folder / "words.txt", VOCAB_SIZE, 300)
    command = [
        "compress",
        "--model",
        str(model),
        "--data",
        str(text),
        "--output",
        str(folder / "tiny"),
        "--keep",
        "none",
    ]
    command += ["--samples", "6", "--held-out", "5", "--seq-length", "12", "--device", "cpu"]
    command += ["--scores", "causal,usefulness"]
    assert main([*command, "--method", ",".join(METHODS), "--pattern", ",".join(PATTERNS)]) == 0
    return folder / "tiny"


def rows_of(table: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((table / "table.json").read_text(encoding="utf-8"))["rows"]
    return rows


def test_page_holds_the_tables_numbers(table: Path, tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(table), str(run), "--output", str(output)]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert page.texts["h1"] == "run, tiny" and [each["name"] for each in page.data["runs"]] == ["run"]
    (shown,) = page.data["compressions"]
    assert shown["command"].startswith("sparsecod compress --model ") and len(shown["warnings"]) >= 1
    rows = rows_of(table)
    assert [row["name"] for row in shown["rows"]] == ["dense", *(f"{m} {p}" for m in METHODS for p in PATTERNS)]
    for row, line in zip(rows, shown["rows"], strict=True):
        cells = dict(zip(shown["columns"], line["cells"], strict=True))
        perplexity = row["perplexity"]
        ends = [math.exp(perplexity[f"loss_{end}"]) for end in ("low", "high")]
        assert list(cells["perplexity [95 %]"].values()) == pytest.approx([perplexity["perplexity"], *ends], rel=1e-5)
        assert cells["non-zero parameters"]["value"] == row["nonzero_parameters"]
        if row["method"] == "dense":
            assert cells["zeros"] is None and cells["causal: causal"] is None and cells["seconds"] is None
            continue
        score = row["scores"][0]
        assert cells["zeros"]["value"] == pytest.approx(row["zeros"], rel=1e-5)
        assert cells["causal: causal"]["value"] == pytest.approx(score["second"], rel=1e-5)
        change = [score[key] for key in ("difference", "low", "high")]
        assert list(cells["causal: causal, change [95 %]"].values()) == pytest.approx(change, rel=1e-5)
        assert cells["output error, worst"]["value"] == pytest.approx(row["output_error"]["worst"], rel=1e-5)


def test_figure_has_a_line_for_each_method_through_its_shares(table: Path, tmp_path: Path) -> None:
    (read,) = load_compressions([table])
    figure = scores_by_sparsity([read])
    loss, causal, mean_log, left = figure.axes
    compressed = [row for row in rows_of(table) if row["method"] != "dense"]
    for axes, key in ((loss, None), (causal, "causal")):
        drawn = {bars.get_label(): bars for bars in axes.containers}
        assert set(drawn) == {*METHODS, *(f"{method}, n:m" for method in METHODS)}
        for label, bars in drawn.items():
            method, _, apart = str(label).partition(", ")
            rows = [row for row in compressed if row["method"] == method and (":" in row["pattern"]) == bool(apart)]
            line, _, (intervals,) = bars.lines
            assert np.allclose(line.get_xdata(), [row["zeros"] for row in rows])
            if key is None:
                values = [row["loss_change"] for row in rows]
                widths = [NORMAL_95 * row["loss_change_stderr"] for row in rows]
                ends = [(value - width, value + width) for value, width in zip(values, widths, strict=True)]
            else:
                values = [row["scores"][0]["difference"] for row in rows]
                ends = [(row["scores"][0]["low"], row["scores"][0]["high"]) for row in rows]
            assert np.allclose(line.get_ydata(), values)
            assert np.allclose([segment[:, 1] for segment in intervals.get_segments()], ends)
    assert "mean_log_usefulness" in mean_log.get_title(loc="left") and len(left.containers) == 2 * len(drawn)
    output = tmp_path / "figure.png"
    assert main(["report", str(table), "--output", str(output)]) == 0
    picture = matplotlib.image.imread(output)
    assert picture.shape[0] > 300 and picture.std() > 0.01


def test_several_tables_have_a_row_each(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "table.json").write_bytes((table / "table.json").read_bytes())
    axes = scores_by_sparsity(load_compressions([table, other])).axes
    assert [each.get_ylabel() for each in axes if each.get_ylabel()] == ["tiny", "other"]
    titles = [each.get_title(loc="left") for each in axes]
    assert titles[:4] == titles[4:] and titles[3].startswith("log usefulness left")


def test_the_usefulness_left_is_that_of_the_blocks_themselves(table: Path) -> None:
    """Of the command's own analyses, by hand; and on planted numbers, where the used half stays and the other goes."""
    (read,) = load_compressions([table])
    found = usefulness_left(read)
    assert set(found) == {(method, pattern) for method in METHODS for pattern in PATTERNS}

    def logs(name: str) -> list[float]:
        scores = json.loads((table / "analysis" / name / "scores.json").read_text(encoding="utf-8"))["scores"]
        return [math.log(row["usefulness"]) for row in scores["usefulness"]["tables"]["usefulness"]]

    dense, pruned = logs("dense"), logs("wanda+cg_2-4")
    least, most = sorted(range(2), key=lambda block: dense[block])
    halves = found["wanda+cg", "2:4"]
    assert halves["least"] == pytest.approx((pruned[least] / dense[least],) * 3)
    assert halves["most"] == pytest.approx((pruned[most] / dense[most],) * 3)
    generator = np.random.default_rng(0)
    dense, order = [*np.linspace(0.1, 0.2, 20), *np.linspace(1, 2, 20)], generator.permutation(40)
    pruned = [0.2 * value if value < 0.5 else 0.9 * value for value in dense] + generator.normal(0, 0.005, 40)
    halves = shares_left([dense[block] for block in order], [pruned[block] for block in order])
    for half, planted in (("least", 0.2), ("most", 0.9)):
        value, low, high = halves[half]
        assert low < value < high < low + 0.1 and value == pytest.approx(planted, abs=0.03)


@pytest.mark.parametrize(
    ("change", "output", "message"),
    [
        ({"rows": [{"method": "wanda"}]}, "page.html", "table.json: its rows lack numbers"),
        ({"rows": []}, "figure.png", "its rows have no depth scores; make the table with --scores"),
        ({}, "both.png", "a figure shows runs or compressions"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    change: dict[str, Any], output: str, message: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((table / "table.json").read_text(encoding="utf-8")) | change
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "table.json").write_text(json.dumps(content), encoding="utf-8")
    others = [str(write_run(tmp_path / "run"))] if output == "both.png" else []
    assert main(["report", str(damaged), *others, "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / output).exists()
    assert main(["report", str(table), str(table), "--output", str(tmp_path / "page.html")]) == 2
    assert "given twice; name each table once" in capsys.readouterr().err
