"""Points of laws from tables of both kinds, the command that fits them, and the laws of a study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.studies import load_study
from sparsecod_megatron.studies.figures import draw_figures
from sparsecod_megatron.studies.law_points import read_rows, select
from sparsecod_megatron.studies.laws import fit_law
from sparsecod_megatron.studies.metrics import cell_metrics
from sparsecod_megatron.studies.schema import ScoresConfig
from sparsecod_megatron.studies.steps import scored_steps
from sparsecod_megatron.studies.table import finished_cells, make_table, write_table
from tests.helpers.cli import sparsecod
from tests.unit.studies.conftest import WriteStudy, leave_result

WIDE = """tokens,loss,loss_low,loss_high,run,kind
100,3.0,2.9,3.1,a,x
200,2.5,2.45,2.55,a,x
400,2.0,1.9,2.1,b,x
800,,,,b,x
1600,1.5,1.4,1.6,c,y
"""
LONG = """depth,metric,mean,low,high,seeds
2,tokens,100,100,100,3
2,loss,3.0,2.9,3.1,3
4,tokens,200,200,200,3
4,loss,2.5,2.45,2.55,3
8,tokens,400,,,1
"""


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_a_column_per_variable(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path, WIDE))
    found = select(rows, ["tokens"], "loss", group="run")
    assert found.points.variables.tolist() == [[100, 200, 400, 1600]]
    assert found.points.values.tolist() == [3.0, 2.5, 2.0, 1.5]
    assert found.points.groups.tolist() == [0, 0, 1, 2]
    assert found.points.weights / found.points.weights[0] == pytest.approx([1, 4, 1, 1])
    assert found.notes == (
        "left out, without all of these numbers: 1 of 5 rows",
        "points weigh 1/σ²; one has 57% of all weight",
    )
    equal = select(rows, ["tokens"], "loss", where={"kind": "x"}, is_weighted=False)
    assert equal.points.weights.tolist() == [1, 1, 1] and len(equal.notes) == 1


def test_a_row_per_metric(tmp_path: Path) -> None:
    """As studies write them: an axis is a variable too, and a place that lacks a metric is left out."""
    rows = read_rows(table(tmp_path, LONG))
    found = select(rows, ["depth", "tokens"], "loss")
    assert found.points.variables.tolist() == [[2, 4], [100, 200]]
    assert found.points.weights == pytest.approx([0.4, 1.6])
    assert found.notes[0] == "left out, without all of these numbers: 1 of 3 rows"
    assert select(rows, ["depth"], "tokens").notes == ("points weigh the same: 1 have no interval",)


@pytest.mark.parametrize(
    ("text", "variables", "where", "message"),
    [
        (WIDE, ["steps"], {}, "column 'steps': not in the table; it has tokens, loss, loss_low, loss_high, run, kind"),
        (WIDE, ["run"], {}, "table.csv:2: column 'run': 'a' is not a number; fix it, or name another column"),
        (WIDE, ["tokens"], {"kind": "z"}, "no row has tokens, loss where kind=z"),
        ("tokens,loss\n1,2,3\n", ["tokens"], {}, "table.csv:2: more cells than the header has columns; fix the line"),
    ],
)
def test_refused(tmp_path: Path, text: str, variables: list[str], where: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        select(read_rows(table(tmp_path, text)), variables, "loss", where=where)


def test_command(tmp_path: Path) -> None:
    sizes = np.geomspace(1e6, 1e9, 8)
    lines = [f"{size},{1.5 + 300 * size**-0.4}" for size in sizes]
    path, output = table(tmp_path, "\n".join(["parameters,loss", *lines])), tmp_path / "law"
    options = ["--law", "power", "--x", "parameters", "--y", "loss", "--resamples", "40"]
    text = sparsecod("fit", path, *options, "--output", output).stdout
    assert text.startswith("loss = a + b·x^−c; x = parameters; 8 points\n  a  1.5 [1.5, 1.5]\n")
    assert "fitted without the largest: 1.575 for 1.575, 0.00% off" in text
    content = json.loads((output / "fit.json").read_text())
    assert content["coefficients"]["c"]["value"] == pytest.approx(0.4, rel=1e-3)
    assert content["law"] == content["fitted"] == "power" and content["num_points"] == 8
    assert (output / "fit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--law=chinchilla"], "--x tokens: law chinchilla is a function of N,D; name a column for each"),
        (["--law=kaplan"], "law 'kaplan': not known; choose one of chinchilla, "),
        (["--law=power"], "law power: 4 points for 3 coefficients; give 5 or more"),
        (["--law=line", "--where=kind"], "--where kind: is not COL=TEXT; give such pairs with commas between them"),
        (["--law=line", "--resamples=3"], "--resamples 3: must be at least 40"),
    ],
)
def test_command_refuses_in_one_line(tmp_path: Path, change: list[str], message: str) -> None:
    result = sparsecod("fit", table(tmp_path, WIDE), "--x", "tokens", "--y", "loss", *change, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"sparsecod fit: {message}") and result.stderr.count("\n") == 1


LAWS = [
    {"law": "line", "x": ["depth"], "y": "perplexity", "where": {"decay": "none"}},
    {"law": "chinchilla", "x": ["parameters_total", "tokens"], "y": "perplexity"},
    {"law": "line", "x": ["depth"], "y": "nothing"},
]


def test_laws_of_a_study(write_study: WriteStudy, tmp_path: Path) -> None:
    """Each cell is a point; what cannot be fitted is refused in its row, and the study has its table all the same."""
    study = load_study(write_study(laws=LAWS), tmp_path / "out")
    for cell in study.cells:
        depth = float(dict(cell.labels)["depth"])
        leave_result(
            study, cell, {"perplexity": 20 - 2 * depth + 0.1 * cell.seed, "parameters_total": 1e6, "tokens": 9.0}
        )
    made = make_table(study.config, finished_cells(study))
    text = write_table(study, made, command="sparsecod study …")
    line, refused, missing = json.loads((study.output / "table.json").read_text())["laws"]
    assert line["num_points"] == line["num_groups"] == 6 and line["coefficients"]["s"]["value"] == pytest.approx(-2)
    assert line["coefficients"]["a"]["value"] == pytest.approx(20.2)
    assert refused["refused"] == "law chinchilla: N takes 1 different values; give 3 or more"
    assert missing["refused"].startswith("column 'nothing': not in the table")
    assert "| line: perplexity of depth, decay=none | a + s·x: a 20.2 [" in text
    assert "| refused: law chinchilla: N takes 1 different values; give 3 or more |" in text
    assert [path.name for path in draw_figures(study, made)] == ["perplexity.png", "law_1_line.png"]


def test_laws_over_checkpoints(write_study: WriteStudy, tmp_path: Path) -> None:
    """Earlier checkpoints are points beside the last ones, and those of one cell are one run."""
    law = {
        "law": "power",
        "x": ["tokens"],
        "y": "loss",
        "over": "checkpoints",
        "where": {"depth": "2", "decay": "none"},
    }
    scores = {"seq_length": 8, "steps": 4}
    study = load_study(write_study(laws=[law, law | {"over": "cells"}], scores=scores), tmp_path / "out")
    for cell in study.cells:
        assert cell.config.checkpoint.save_steps == [1, 2, 5], "and the last, which is always saved"
        losses = {64 * step: 1 + 30 * (64 * step) ** -0.5 for step in (1, 2, 5, 10)}
        points = [
            {
                "step": tokens // 64,
                "tokens": tokens,
                "metrics": {"loss": loss},
                "intervals": {"loss": [loss - 1, loss + 1]},
            }
            for tokens, loss in losses.items()
        ]
        leave_result(study, cell, {"loss": losses[640], "tokens": 640.0}, points=points)
    over, cells = make_table(study.config, finished_cells(study)).laws
    assert over.fit is not None and (over.fit.num_points, over.fit.num_groups) == (12, 3)
    assert over.fit.coefficients["c"].value == pytest.approx(0.5, rel=1e-3)
    assert over.selected is not None and over.selected.notes == ("points weigh 1/σ²",)
    assert cells.refusal == "law power: 3 points for 3 coefficients; give 5 or more"
    with pytest.raises(ConfigError, match=r"laws\[0\].over: checkpoints, but scores.steps=0 scores the last alone"):
        load_study(write_study(laws=[law]), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ScoresConfig(), []),
        (ScoresConfig(steps=1), []),
        (ScoresConfig(steps=4), [10, 46, 215]),
        (ScoresConfig(steps=4, spacing="linear"), [250, 500, 750]),
    ],
)
def test_which_steps_are_scored(settings: ScoresConfig, expected: list[int]) -> None:
    assert scored_steps(settings, 1000) == expected
    assert scored_steps(settings, 1) == []


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"law": "nothing", "x": ["depth"]}, "law 'nothing': not known"),
        ({"law": "journey", "x": ["depth"]}, r"laws\[0\].x depth: law journey is a function of N̄,D"),
        ({"law": "line", "x": ["depth"], "where": {"decay": "all"}}, r"laws\[0\].where: decay=all is not in the grid"),
    ],
)
def test_wrong_laws_of_a_study(write_study: WriteStudy, tmp_path: Path, law: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(laws=[law | {"y": "perplexity"}]), tmp_path / "out")


def test_journey_and_chinchilla_of_dense_runs_are_one_law(tmp_path: Path, repo_root: Path) -> None:
    """N̄ is N where no mechanism says otherwise, and less by what two of them held at zero."""
    (tmp_path / "results.json").write_text("{}")
    config = load_config(repo_root / "examples/configs/nano_dense.yaml", ["model.vocab_size=256"])

    def measured() -> dict[str, float]:
        return cell_metrics(config, run=tmp_path, analysis=tmp_path, evaluation=tmp_path)

    dense = measured()
    assert dense["parameters_mean_live"] == dense["parameters_non_embedding"] < dense["parameters_total"]
    assert dense["tokens_per_parameter"] == dense["tokens"] / dense["parameters_total"] and dense["active_share"] == 1
    total = dense["parameters_total"]
    last = {"mean_live_parameters": total - 1000, "second/mean_live_parameters": total - 10}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"loss": 1.0}) + "\n" + json.dumps(last) + "\n")
    assert measured()["parameters_mean_live"] == dense["parameters_non_embedding"] - 1010
    assert "live_share_end" not in measured()


@pytest.mark.parametrize("shares", [{"live_share": 0.25}, {"live_share": 0.25, "second/live_share": 0.5}])
def test_the_share_left_at_the_end_is_that_of_one_mechanism(
    tmp_path: Path, repo_root: Path, shares: dict[str, float]
) -> None:
    """The last step's; two mechanisms have no share in common."""
    config = load_config(repo_root / "examples/configs/nano_dense.yaml", ["model.vocab_size=256"])
    lines = [{"loss": 1.0, "live_share": 1.0}, {"loss": 1.0, **shares}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = cell_metrics(config, run=tmp_path, analysis=tmp_path, evaluation=tmp_path)
    assert found.get("live_share_end") == (0.25 if len(shares) == 1 else None)


def test_fit_of_selected_points(tmp_path: Path) -> None:
    """From the file to the law: weights reach the fit."""
    rows = [
        f"{x},{3 * x + (100 if x == 5 else 0)},{3 * x - width},{3 * x + width}"
        for x, width in zip(range(1, 9), [1, 1, 1, 1, 1e4, 1, 1, 1], strict=True)
    ]
    selected = select(read_rows(table(tmp_path, "\n".join(["x,y,y_low,y_high", *rows]))), ["x"], "y")
    assert fit_law("line", selected.points, num_resamples=40).coefficients["s"].value == pytest.approx(3, abs=1e-3)
