"""The atlas: planted effects and their verdicts, what has no number and why, and the page of the kept results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.errors import SparsecodError
from sparsecod_megatron.studies.atlas import Atlas, load_atlas
from sparsecod_megatron.studies.atlas_answer import DAMPS, MITIGATES, NEITHER, answer, effect
from sparsecod_megatron.studies.atlas_cells import COLUMNS, EQUALITIES, SCORES, TIME, USEFULNESS, VARIANCE
from sparsecod_megatron.studies.atlas_figure import atlas_figure
from sparsecod_megatron.studies.atlas_text import page, shown
from sparsecod_megatron.studies.claims import NOT_SEPARABLE
from tests.helpers.results_page import kept_studies, kept_study
from tests.unit.analysis.test_report import Page

ROOT = Path(__file__).resolve().parents[3]
SHIPPED, KEPT = ROOT / "examples/studies/nano_atlas.yaml", ROOT / "docs/results/nano"
PLAIN = {
    "tokens": 1000.0,
    "parameters_total": 500.0,
    "parameters_active": 500.0,
    "train_flops": 4e6,
    "tokens_per_s": 10.0,
    "perplexity": 400.0,
    VARIANCE: 100.0,
    "causal/causal": 0.3,
    USEFULNESS: 1e-3,
    "jacobian/jacobian_deviation": 1.0,
}
EFFECTS: dict[str, dict[str, float]] = {
    "plain": {},
    "cure": {"perplexity": 300.0, VARIANCE: 5.0, USEFULNESS: 9e-3, "live_share_end": 0.25},
    "damp": {VARIANCE: 20.0, "live_share_end": 0.5},
    "idle": {"tokens_per_s": 5.0},
    "longer": {"tokens": 2000.0, "train_flops": 4e6, "perplexity": 200.0},
    "bigger": {"parameters_total": 900.0, "parameters_active": 450.0, "perplexity": 350.0},
}
"""What each place differs in from the plain model; all else is noise that both share, and a little of their own."""
ATLAS: dict[str, Any] = {
    "title": "planted",
    "remedies": ["remedy"],
    "comparisons": [
        {
            "study": "small",
            "control": "plain",
            "kind": "weights",
            "sparsity": "weights",
            "places": {
                "cure": {"mechanism": "mask", "setting": "75 %"},
                "damp": {"mechanism": "mask", "setting": "50 %"},
                "idle": {"mechanism": "nothing", "setting": "", "sparsity": "none", "kind": "remedy"},
                "longer": {"mechanism": "more tokens", "setting": "", "sparsity": "unmeasured"},
                "bigger": {"mechanism": "experts", "setting": "", "sparsity": "parameters"},
            },
        }
    ],
}


def cells(effects: dict[str, dict[str, float]], seeds: tuple[int, ...] = (1, 2, 3)) -> list[dict[str, Any]]:
    """Seeds differ by 30 %, places by what is planted and by half a per cent."""
    found = []
    for number, (place, planted) in enumerate(effects.items()):
        for seed in seeds:
            shared, own = (np.random.default_rng([*key, 5]).standard_normal() for key in ((seed,), (seed, number)))
            metrics = PLAIN | planted
            for name in ("perplexity", *SCORES):
                metrics[name] = metrics[name] * (1 + 0.005 * own) + 0.1 * PLAIN[name] * shared
            found.append({"labels": {"method": place}, "seed": seed, "metrics": metrics})
    return found


def write_results(path: Path, found: list[dict[str, Any]], study: str = "small") -> Path:
    """As studies' first version kept them: no rows, checkpoints, laws, nor corrected verdicts."""
    path.write_text(json.dumps({"study": study, "command": "sparsecod study", "cells": found, "claims": []}))
    return path


def write_atlas_file(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(ATLAS | keys, sort_keys=False))
    return path


@pytest.fixture
def planted(tmp_path: Path) -> Atlas:
    results = write_results(tmp_path / "small.json", cells(EFFECTS))
    return load_atlas(write_atlas_file(tmp_path / "atlas.yaml"), [results])


def test_planted_effects_have_their_verdicts(planted: Atlas) -> None:
    """Against scipy's paired test, and Holm by its definition over all rows of a metric."""
    rows = {row.place: row for row in planted.rows}
    assert {place: row.entries[VARIANCE].verdict for place, row in rows.items()} == {
        "cure": "lower", "damp": "lower", "idle": NOT_SEPARABLE, "longer": NOT_SEPARABLE, "bigger": NOT_SEPARABLE,
    }  # fmt: skip
    assert (rows["cure"].entries[USEFULNESS].verdict, rows["damp"].entries[USEFULNESS].verdict) == (
        "higher",
        NOT_SEPARABLE,
    )
    assert {place: effect(row) for place, row in rows.items()} == {
        "cure": MITIGATES, "damp": DAMPS, "idle": NEITHER, "longer": "", "bigger": NEITHER,
    }  # fmt: skip
    of_place: dict[str, list[float]] = {}
    for cell in cells(EFFECTS):
        of_place.setdefault(cell["labels"]["method"], []).append(cell["metrics"][VARIANCE])
    expected = {place: scipy.stats.ttest_rel(of_place[place], of_place["plain"]) for place in rows}
    for place, row in rows.items():
        entry, difference = row.entries[VARIANCE], np.subtract(of_place[place], of_place["plain"])
        assert entry.value is not None and entry.difference is not None
        assert entry.value.value == pytest.approx(np.mean(of_place[place]))
        assert entry.difference.value == pytest.approx(difference.mean())
        interval = expected[place].confidence_interval()
        assert (entry.difference.low, entry.difference.high) == pytest.approx(tuple(interval), rel=1e-4)
        assert entry.p_value == pytest.approx(expected[place].pvalue, rel=1e-3)
    ordered = sorted(rows.values(), key=lambda row: row.entries[VARIANCE].p_value or 0.0)
    raw = [expected[row.place].pvalue * (len(ordered) - rank) for rank, row in enumerate(ordered)]
    holm = np.maximum.accumulate(np.minimum(raw, 1))
    assert [row.entries[VARIANCE].p_holm for row in ordered] == pytest.approx(list(holm), rel=1e-3)


def test_perplexities_are_compared_only_where_something_is_equal(planted: Atlas) -> None:
    def reasons(place: str) -> list[str]:
        (row,) = (row for row in planted.rows if row.place == place)
        return [row.entries[column].reason for column in EQUALITIES]

    assert reasons("idle") == ["", "", ""]
    assert reasons("longer") == ["tokens differ", "tokens differ", ""]
    assert reasons("bigger") == ["", "parameters differ", ""]
    assert reasons("cure") == ["", "", "effective operations differ"]  # its dead weights take no part in them
    text = page(planted, command="sparsecod atlas", picture="atlas.png")
    assert "| effective operations differ | 2 | 1–2 |" in text and "2k against 1k" in text
    first = text.split("\n\n")[1]
    assert first.startswith("**Which kinds of sparsity mitigate") and "mask [weights] (1 of 2).**" in first
    assert "none" in answer([])[0]


def test_sparsity_and_cost(planted: Atlas) -> None:
    rows = {row.place: row for row in planted.rows}
    shares = {place: row.entries["sparsity"].value for place, row in rows.items()}
    assert shares["cure"] is not None and shares["cure"].value == 0.75
    assert shares["bigger"] is not None and shares["bigger"].value == 0.5
    assert shares["longer"] is None and rows["idle"].entries["sparsity"].reason == "not a sparsity"
    time = rows["idle"].entries[TIME]
    assert time.value is not None and time.value.value == pytest.approx(2.0)
    operations = rows["longer"].entries["operations_per_token"].value
    assert operations is not None and operations.value == pytest.approx(0.5)


def test_a_metric_that_was_not_measured_is_named(tmp_path: Path) -> None:
    found = cells(EFFECTS)
    for cell in found:
        del cell["metrics"]["jacobian/jacobian_deviation"]
        if cell["labels"]["method"] == "damp":
            cell["metrics"].pop(USEFULNESS)
            cell["metrics"].pop("live_share_end")
    results = write_results(tmp_path / "small.json", found)
    atlas = load_atlas(write_atlas_file(tmp_path / "atlas.yaml"), [results])
    row = next(row for row in atlas.rows if row.place == "damp")
    assert row.entries["jacobian/jacobian_deviation"].reason == "the study did not measure it"
    assert row.entries[USEFULNESS].reason == "no seed has it"
    assert row.entries["sparsity"].reason == "its results do not record it"
    text = page(atlas, command="sparsecod atlas", picture="atlas.png")
    assert "| Jacobian deviation | the study did not measure it | 5 | 1–5 |" in text
    empty = [row.entries[column].reason for row in atlas.rows for column in COLUMNS]
    assert f"{sum(map(bool, empty))} of {len(empty)}." in text
    assert "without both numbers: 2" in [label.get_text() for label in atlas_figure(atlas)[0].axes[0].texts]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"control": "dense"}, "study small: control dense is in none of small.json, which have bigger, cure"),
        ({"places": {"cure": {}}}, "place bigger of study small has results, but stands neither in"),
        ({"places": {"cure": {}, "lost": {}}}, "study small: place lost is in none of small.json"),
        ({"study": "other"}, "study small has results, but stands neither in comparisons nor in left_out"),
        ({"sparsity": "some"}, "comparisons[0] (small): sparsity: 'some'"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_results(tmp_path / "small.json", cells(EFFECTS))
    file = write_atlas_file(tmp_path / "atlas.yaml", comparisons=[ATLAS["comparisons"][0] | changes])
    assert main(["atlas", str(file), str(results), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"study": "small", "cells": [{"seed": 1}]}'])
def test_files_of_something_else_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(content)
    with pytest.raises(SparsecodError, match=r"small\.json: not the results of a study"):
        load_atlas(write_atlas_file(tmp_path / "atlas.yaml"), [tmp_path])


def test_the_longest_run_is_shown_and_the_other_counted(tmp_path: Path) -> None:
    """A place that the longer run lacks keeps the shorter one's numbers."""
    longer = {place: values | {"tokens": 9000.0} for place, values in EFFECTS.items() if place != "damp"}
    files = [
        write_results(tmp_path / "long.json", cells(longer)),
        write_results(tmp_path / "short.json", cells(EFFECTS)),
    ]
    atlas = load_atlas(write_atlas_file(tmp_path / "atlas.yaml"), files)
    used = {row.place: (row.kept.path.name, row.tokens) for row in atlas.rows}
    assert used["cure"] == ("long.json", (9000.0, 9000.0)) and used["damp"] == ("short.json", (1000.0, 1000.0))
    ((kept, places),) = atlas.shorter
    assert kept.path.name == "short.json" and set(places) == {"cure", "idle", "longer", "bigger"}
    assert "short.json: cure" in page(atlas, command="sparsecod atlas", picture="atlas.png")
    with pytest.raises(SparsecodError, match="with as many tokens as in"):
        load_atlas(tmp_path / "atlas.yaml", [*files, write_results(tmp_path / "again.json", cells(EFFECTS))])


def test_a_study_without_control_shows_its_values(tmp_path: Path) -> None:
    file = write_atlas_file(
        tmp_path / "atlas.yaml",
        comparisons=[{"study": "small", "kind": "weights", "mechanism": "one of six masks", "sparsity": "weights"}],
        left_out={"small/plain": "it is another's"},
    )
    atlas = load_atlas(file, [write_results(tmp_path / "small.json", cells(EFFECTS, seeds=(1,)))])
    row = atlas.rows[0]
    assert [each.place for each in atlas.rows] == ["cure", "damp", "idle", "longer", "bigger"]
    assert row.entries[VARIANCE].difference is None and row.name == "one of six masks, cure"
    value = row.entries[VARIANCE].value
    assert value is not None and shown(VARIANCE, row.entries[VARIANCE]) == f"{value.value:.3g}"
    assert all(row.entries[column].reason == "the study has no control" for column in (*EQUALITIES, TIME))
    text = page(atlas, command="sparsecod atlas", picture="atlas.png")
    assert "5 rows have one seed" in text and "small/plain: it is another's" in text


def test_all_formats_agree(tmp_path: Path) -> None:
    results = write_results(tmp_path / "small.json", cells(EFFECTS))
    file, output = write_atlas_file(tmp_path / "atlas.yaml"), tmp_path / "out"
    command = ["atlas", str(file), str(results), "--output", str(output), "--page", str(tmp_path / "ATLAS.md")]
    assert main(command) == 0
    content = json.loads((output / "atlas.json").read_text())
    lines = list(csv.DictReader((output / "atlas.csv").read_text().splitlines()))
    assert len(lines) == len(content["rows"]) * len(COLUMNS)
    for line in lines:
        cell = content["rows"][int(line["row"]) - 1]["cells"][line["column"]]
        assert (line["verdict"], line["verdict_holm"], line["reason"]) == (
            cell["verdict"],
            cell["verdict_holm"],
            cell["reason"],
        )
        difference = cell["difference"] and cell["difference"]["value"]
        assert (line["difference"] or None) == (None if difference is None else str(difference))
    (atlas,) = Page((output / "atlas.html").read_text()).data["atlases"]
    assert [row[1] for row in atlas["rows"]] == [
        f"{row['mechanism']}, {row['setting']}".removesuffix(", ") for row in content["rows"]
    ]
    column = atlas["columns"].index("variance of the last layer")
    assert [row[column]["value"] for row in atlas["rows"]] == pytest.approx(
        [row["cells"][VARIANCE]["difference"]["value"] for row in content["rows"]]
    )
    assert (tmp_path / "ATLAS.png").read_bytes() == (output / "atlas.png").read_bytes()
    text = (tmp_path / "ATLAS.md").read_text()
    assert text.replace("(ATLAS.png)", "(atlas.png)") == (output / "atlas.md").read_text()
    assert f"    sparsecod {' '.join(command)}\n" in text


# ---------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def nano() -> Atlas:
    return load_atlas(SHIPPED, [KEPT])


def test_the_page_is_that_of_the_kept_results(nano: Atlas) -> None:
    """Made again by the command that the page names, which the head of the atlas's file names too."""
    text = (ROOT / "docs/ATLAS.md").read_text(encoding="utf-8")
    command = next(line.strip() for line in text.splitlines() if line.startswith("    sparsecod atlas"))
    assert command in SHIPPED.read_text(encoding="utf-8")
    assert page(nano, command=command, picture="ATLAS.png") == text
    assert atlas_figure(nano)[1] == sum(row.control is not None for row in nano.rows)


def test_differences_are_those_of_the_studies_own_claims(nano: Atlas) -> None:
    """Wherever a claim compares a row with its control, by its metric, both say the same."""
    compared = 0
    verdicts = {name: kept_study(name)[1].verdicts for name in kept_studies()}
    for row in nano.rows:
        for verdict in verdicts.get(row.kept.path.stem, []):
            said, metric = verdict.claim, verdict.claim.metric
            ends = ["/".join((end or {}).values()) for end in (said.higher, said.lower)]
            column = "perplexity_equal_tokens" if metric == "perplexity" else metric
            if set(ends) != {row.place, row.control} or column not in COLUMNS or row.entries[column].reason:
                continue
            difference = row.entries[column].difference
            assert difference is not None and verdict.difference is not None
            sign = 1 if ends[0] == row.place else -1
            assert sign * difference.value == pytest.approx(verdict.difference.value)
            compared += 1
    assert compared > 40


def test_budgets_and_places_are_those_of_the_studies(nano: Atlas) -> None:
    """What the atlas's file says of a study is what the study's file says; every shipped study is in it."""
    for comparison in nano.config.comparisons:
        study = yaml.safe_load((SHIPPED.parent / f"nano/{comparison.study}.yaml").read_text(encoding="utf-8"))
        assert study["budget"]["match"] == comparison.match, comparison.study
        (axis,) = study["grid"]
        labels = set(axis.get("cells") or map(str, axis["values"]))
        assert {*comparison.places, *([comparison.control] if comparison.control else [])} <= labels
    named = {comparison.study for comparison in nano.config.comparisons} | set(nano.config.left_out)
    assert {path.stem for path in (SHIPPED.parent / "nano").glob("*.yaml")} - {"base"} <= named
