"""The figure variance by depth: its lines are the files' numbers, its file is whole and always the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsecod_megatron.analysis.depth_plot import plot_variance_by_depth, shown_steps, variance_by_depth
from sparsecod_megatron.analysis.runs import STATISTICS_FILE, Run, load_runs
from sparsecod_megatron.cli.main import main
from tests.unit.analysis.run_files import write_lines, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    dense = write_run(tmp_path / "dense", num_layers=6, steps=range(1, 101))
    moe = write_run(tmp_path / "moe", num_layers=5, steps=range(1, 41), num_experts=4, scale=0.3)
    return load_runs([dense, moe])


def lines_of(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def written(run: Run, name: str) -> dict[int, list[float]]:
    """The field by step, read from the file without the code under test."""
    records = map(json.loads, (run.path / STATISTICS_FILE).read_text().splitlines())
    return {record["step"]: [layer[name] for layer in record["layers"]] for record in records}


def test_left_panel_is_the_last_step_with_its_branches(runs: list[Run]) -> None:
    axes = variance_by_depth(runs).axes[0]
    expected = []
    for run, last in zip(runs, (100, 40), strict=True):
        for name in ("out_var", "attn_var", "mlp_var"):
            values = written(run, name)[last]
            expected.append((list(range(len(values))), values))
    assert lines_of(axes) == expected
    assert axes.get_yscale() == "log"


def test_right_panel_goes_through_training(runs: list[Run]) -> None:
    figure = variance_by_depth(runs)
    expected = []
    for run, steps in zip(runs, ([1, 5, 22, 100], [1, 3, 12, 40]), strict=True):
        assert run.layers["out_var"].steps[shown_steps(run)].tolist() == steps
        expected += [written(run, "out_var")[step] for step in steps]
    assert [ys for _, ys in lines_of(figure.axes[1])] == expected


def legend_texts(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


def test_labels_say_which_run_is_which(runs: list[Run]) -> None:
    texts = legend_texts(variance_by_depth(runs))
    assert {"dense (dense), step 100", "moe (MoE), step 40", "attention branch", "MLP branch"} <= set(texts)
    assert texts[-2:] == ["first collected step", "last"]
    assert legend_texts(variance_by_depth(runs[:1]))[-4:] == ["step 1", "step 5", "step 22", "step 100"]


def test_one_collected_step_is_enough(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "short", steps=[3], num_layers=1)])
    assert [len(axes.get_lines()) for axes in variance_by_depth([run]).axes] == [3, 1]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_the_same_every_time(runs: list[Run], tmp_path: Path, suffix: str, magic: bytes) -> None:
    outputs = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for output in outputs:
        plot_variance_by_depth(runs, output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].read_bytes().startswith(magic)


def test_run_without_the_variance_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "run")
    write_lines(path / STATISTICS_FILE, [{"step": 1, "tokens": 1, "layers": [{"layer": 0, "cos": 1.0}]}])
    assert main(["report", str(path), "--output", str(tmp_path / "figure.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no out_var" in error and "statistics.variance.interval" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
