"""Reading run directories: what arrives in the arrays, and what a damaged file says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.analysis.runs import METRICS_FILE, STATISTICS_FILE, load_runs
from sparsecod_megatron.cli.main import main
from sparsecod_megatron.config import IntervalConfig, load_config, save_config
from tests.unit.analysis.run_files import loss, out_var, write_lines, write_run


def test_arrays_hold_what_the_files_hold(tmp_path: Path) -> None:
    steps = [1, 2, 5, 9]
    (run,) = load_runs([write_run(tmp_path / "moe", steps=steps, num_layers=3, num_experts=4, everything=True)])
    assert (run.name, run.kind, run.notes) == ("moe", "MoE", ())
    assert run.metrics["loss"].steps.tolist() == steps
    assert run.metrics["loss"].tokens.tolist() == [512, 1024, 2560, 4608]
    assert run.metrics["loss"].values.tolist() == [loss(step) for step in steps]
    expected = [[out_var(step, layer) for layer in range(3)] for step in steps]
    assert run.layers["out_var"].values.tolist() == expected
    lines = (run.path / STATISTICS_FILE).read_text().splitlines()
    counts = [[layer["tokens_per_expert"] for layer in json.loads(line)["layers"]] for line in lines]
    assert run.vectors["tokens_per_expert"].values.tolist() == counts


def test_groups_collected_at_other_intervals_keep_their_own_steps(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "run", steps=range(1, 32), everything=True)])
    assert run.layers["cos"].steps.tolist() == [1, 11, 21, 31]
    assert run.layers["my_own_number"].values[0].tolist() == [-3.5, -2.5, -1.5, -0.5]
    assert run.metrics["validation_loss"].steps.tolist() == [31]


def test_field_of_some_layers_is_missing_in_the_others(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=2)
    layers = [{"layer": 0, "out_var": 1.0}, {"layer": 1, "out_var": 2.0, "z_loss": 0.5, "tokens_per_expert": [3, 4]}]
    write_lines(path / STATISTICS_FILE, [{"step": 1, "tokens": 9, "layers": layers}])
    (run,) = load_runs([path])
    np.testing.assert_array_equal(run.layers["z_loss"].values, [[math.nan, 0.5]])
    np.testing.assert_array_equal(run.vectors["tokens_per_expert"].values, [[[math.nan, math.nan], [3, 4]]])


def test_notes_name_interrupted_writes_infinities_and_what_is_no_number(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    records = [
        {"step": 1, "tokens": 8, "loss": 2.0, "host": "a"},
        {"step": 2, "tokens": 16, "loss": math.nan, "host": "b"},
    ]
    write_lines(path / METRICS_FILE, records)
    with (path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "tokens": 24, "loss": 1.0}')
    (run,) = load_runs([path])
    assert run.metrics["loss"].steps.tolist() == [1, 2]
    assert set(run.metrics) == {"loss"}
    assert run.notes == (
        "host is not a number everywhere and is left out",
        "metrics.jsonl line 3 was cut off by an interruption and is left out",
        "loss is non-finite at 1 of 2 steps, first at step 2",
    )


def test_statistics_that_were_switched_off_are_no_fault(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_lines(path / STATISTICS_FILE, [])
    config = load_config(path / "config.yaml")
    for group in vars(config.statistics).values():
        if isinstance(group, IntervalConfig):
            group.interval = 0
    save_config(config, path / "config.yaml")
    (run,) = load_runs([path])
    assert run.layers == {} and len(run.metrics["loss"].steps) == 20
    assert main(["report", str(path), "--output", str(tmp_path / "off.html")]) == 0


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / "run") for folder in ("a", "b")]
    assert [run.name for run in load_runs(paths)] == ["a/run", "b/run"]


FAULTS = [
    ("metrics.jsonl", "", "metrics.jsonl: holds no complete line"),
    ("metrics.jsonl", '{"step": 1, "tok', "metrics.jsonl: holds no complete line"),
    ("layer_statistics.jsonl", "", "layer_statistics.jsonl: holds no complete line"),
    ("metrics.jsonl", '{"step": 1, "tokens": 1}\n{"step": \n', "metrics.jsonl:2: not JSON"),
    ("metrics.jsonl", '{"step": 1, "tokens": 1}\n\xff\n', "metrics.jsonl:2: not JSON"),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: holds a list"),
    ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl:1: tokens is None"),
    ("metrics.jsonl", '{"step": 2.5, "tokens": 1}\n', "metrics.jsonl:1: step is 2.5"),
    ("metrics.jsonl", '{"step": 2, "tokens": 1}\n{"step": 1, "tokens": 1}\n', "metrics.jsonl:2: step 1 after step 2"),
    ("layer_statistics.jsonl", '{"step": 1, "tokens": 1}\n', "layer_statistics.jsonl:1: layers is not a list"),
    ("layer_statistics.jsonl", '{"step": 1, "tokens": 1, "layers": [{"layer": 9}]}\n', "model.num_layers=4"),
    (
        "layer_statistics.jsonl",
        '{"step": 1, "tokens": 1, "layers": [{"layer": 0, "n": [1, 2]}]}\n'
        '{"step": 2, "tokens": 1, "layers": [{"layer": 0, "n": [1]}]}\n',
        "layer_statistics.jsonl:2: n no longer has 2 entries",
    ),
    ("config.yaml", "model: {num_layer: 3}\n", "config.yaml: unknown key 'model.num_layer'"),
]


@pytest.mark.parametrize(("file", "text", "message"), FAULTS)
def test_damage_is_one_line_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    path = write_run(tmp_path / "run")
    (path / file).write_bytes(text.encode("latin-1"))
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "layer_statistics.jsonl"])
def test_other_folders_are_not_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    path = write_run(tmp_path / "run")
    (path / missing).unlink()
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert f"not a run directory (no {missing} in it)" in capsys.readouterr().err


def test_run_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "run")
    assert main(["report", str(path), f"{path}/../run", "--output", str(tmp_path / "page.html")]) == 2
    assert "given twice" in capsys.readouterr().err
