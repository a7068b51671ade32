"""The report page as a file: its data, its safety against what names hold, its size, and where it may be written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.analysis.report import report_page
from sparsecod_megatron.analysis.report.fields import ordered_layer_fields
from sparsecod_megatron.analysis.report.page import embedded_json
from sparsecod_megatron.analysis.report.payload import report_payload
from sparsecod_megatron.analysis.runs import METRICS_FILE, STATISTICS_FILE, Run, Series, load_runs
from sparsecod_megatron.cli.main import main
from tests.unit.analysis.run_files import loss, write_lines, write_run


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text of its scripts, styles and title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._inside = attributes.get("id") or tag if tag in ("script", "style", "title", "h1") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    @property
    def data(self) -> Any:
        return json.loads(self.texts["data"])


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    dense = write_run(tmp_path / "dense", everything=True)
    moe = write_run(tmp_path / "moe", num_layers=3, num_experts=4, everything=True)
    return load_runs([dense, moe])


def test_page_holds_the_files_numbers(runs: list[Run]) -> None:
    data = Page(report_page(runs)).data
    lines = [json.loads(line) for line in (runs[1].path / STATISTICS_FILE).read_text().splitlines()]
    moe = data["runs"][1]
    assert (moe["name"], moe["kind"]) == ("moe", "MoE")
    assert moe["layers"]["out_var"]["steps"] == [line["step"] for line in lines]
    for layer in range(3):
        expected = [line["layers"][layer]["out_var"] for line in lines]
        assert moe["layers"]["out_var"]["values"][layer] == pytest.approx(expected, rel=5e-5)
    counts = [[layer["tokens_per_expert"] for layer in line["layers"]] for line in lines]
    assert moe["vectors"]["tokens_per_expert"]["values"] == counts
    assert data["runs"][0]["metrics"]["loss"]["values"] == pytest.approx(
        [loss(step) for step in range(1, 21)], rel=5e-6
    )
    assert "my_own_number" in data["fields"]


def test_facts_come_from_the_configuration(runs: list[Run]) -> None:
    facts = dict(Page(report_page(runs)).data["runs"][1]["facts"])
    assert facts["Layers"] == "3"
    assert facts["Experts"] == "top 2 of 4 + shared 96"
    assert facts["Layout"] == "TP 2 · SP"
    assert facts["Attention heads / groups"] == "12 / 4"
    assert facts["Tokens"] == "10,240"
    assert facts["Last loss"] == f"{loss(20):.4f} at step 20"


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    losses = (1.5, math.nan, math.inf, 2.0)
    write_lines(path / METRICS_FILE, [{"step": at, "tokens": at, "loss": value} for at, value in enumerate(losses)])
    data = Page(report_page(load_runs([path]))).data
    assert data["runs"][0]["metrics"]["loss"]["values"] == [1.5, None, None, 2]


HOSTILE = "</script><script>alert(1)</script><!--%%data%%&amp;\u2028\"'"


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    folder, _, rest = HOSTILE.partition("/")
    last = rest.replace("/", "")  # a name holds a slash only between folders, which two runs of one name show
    paths = [write_run(tmp_path / folder / last), write_run(tmp_path / "b" / last)]
    write_lines(paths[0] / METRICS_FILE, [{"step": 1, "tokens": 1, "loss": 1.0, HOSTILE: 2.0}])
    page = Page(report_page(load_runs(paths)))
    name = f"{folder}/{last}"
    assert name.startswith("</script><script>")
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert page.texts["h1"].startswith(name) and page.texts["title"].startswith(name)
    assert page.data["runs"][0]["name"] == name
    assert page.data["runs"][0]["metrics"][HOSTILE]["values"] == [2]


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_embedded_json_is_inert_and_reads_back(value: Any) -> None:
    text = embedded_json(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text) and text.isascii()


def test_page_needs_nothing_else_and_the_browser_is_told_so(runs: list[Run]) -> None:
    text = report_page(runs)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base") and not {"src", "href", "style"} & set(attributes)
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in (policy or "")
    assert (policy or "").startswith("default-src 'none'; ")
    addresses = set(re.findall(r"https?://[^\"'\s]+", page.texts["script"] + page.texts["style"]))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not fetched


def test_same_runs_give_the_same_page_in_any_process(runs: list[Run], tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        output = tmp_path / f"page{seed}.html"
        command = ["report", *(str(run.path) for run in runs), "--output", str(output)]
        subprocess.run(
            [sys.executable, "-m", "sparsecod_megatron", *command],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
        )
        pages.append(output.read_bytes())
    assert pages[0] == pages[1] == report_page(runs).encode()


def test_long_runs_stay_under_five_megabytes_with_their_spikes(runs: list[Run]) -> None:
    """Two runs of 32 layers, 10,000 steps and 35 statistics, with 64 experts; every number with all its digits."""
    random = np.random.default_rng(0)
    steps = np.arange(1, 10_001)
    layers = {f"field_{index}": Series(steps, steps * 512, random.lognormal(size=(10_000, 32))) for index in range(35)}
    spike = layers["field_0"].values
    spike[4321, 7] = 1e4
    experts = Series(steps, steps * 512, random.integers(0, 4096, (10_000, 32, 64)).astype(float))
    losses = {name: Series(steps, steps * 512, random.lognormal(size=10_000)) for name in ("loss", "lr", "grad_norm")}
    long = [
        Run(name, Path(name), runs[0].config, losses, layers, {"tokens_per_expert": experts}, ()) for name in ("a", "b")
    ]
    text = report_page(long)
    assert len(text.encode()) < 5_000_000
    stored = Page(text).data["runs"][0]["layers"]["field_0"]
    assert 100 < len(stored["steps"]) <= 600 and stored["total"] == 10_000
    assert stored["values"][7][stored["steps"].index(4322)] == 10_000
    few = [Run("a", Path("a"), runs[0].config, losses, dict(list(layers.items())[:8]), {}, ())] * 2
    assert 500 <= len(report_payload(few)["runs"][0]["layers"]["field_0"]["steps"]) <= 600


def test_order_of_fields_is_the_pages_own() -> None:
    names = {"zz", "ref_out_var", "load_entropy", "out_kurt", "mlp_var", "out_var", "attn_var"}
    expected = ["out_var", "attn_var", "mlp_var", "out_kurt", "load_entropy", "zz", "ref_out_var"]
    assert ordered_layer_fields(names) == expected


# ---------------------------------------------------------------- --output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("page.htm", "ends in '.htm'; give a file that ends in .html, .png, .svg, .pdf"),
        ("page", "ends in ''"),
        ("folder.html", "is a folder"),
        ("file.txt/page.html", "is a file; give a path in a folder"),
    ],
)
def test_impossible_outputs_are_refused_before_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file.txt").touch()
    assert main(["report", str(tmp_path / "no-such-run"), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_refused_write_leaves_the_older_page(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "page.html"
    output.write_text("older")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert main(["report", str(runs[0].path), "--output", str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text() == "older"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_folders_on_the_way_are_made(runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "deep" / "page.html"
    assert main(["report", str(runs[0].path), "--output", str(output)]) == 0
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out.startswith(f"wrote {output} ")
