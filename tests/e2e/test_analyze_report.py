"""Analyses in a real browser: every figure is drawn from the file's numbers, and toggles and keys work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from tests.unit.analysis.run_files import write_run
from tests.unit.analysis.scores.families import NUM_LAYERS, context, tiny

pytest.importorskip("selenium", reason="needs the selenium package (extra `dev`)")

from selenium.webdriver import Chrome  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from sparsecod_megatron.analysis.analyze import analyze, write_analysis  # noqa: E402
from sparsecod_megatron.analysis.scores.registry import find_scores  # noqa: E402
from tests.e2e.test_report_browser import (  # noqa: E402
    browser,  # noqa: F401
    click,
    find,
    number,
    pytestmark,  # noqa: F401
    table,
    tooltip,
    wait_for,
)

SCORES = ["causal", "permutation", "usefulness", "lens"]


@pytest.mark.parametrize("with_run", [False, True])
def test_analyses_are_drawn(browser: Chrome, tmp_path: Path, with_run: bool) -> None:  # noqa: F811
    for family in ("llama", "gpt2"):
        write_analysis(analyze(context(tiny(family)), find_scores(SCORES), settings={}), tmp_path / family)
    paths = [write_run(tmp_path / "run")] if with_run else []
    paths += [tmp_path / "llama", tmp_path / "gpt2"]
    assert main(["report", *map(str, paths), "--output", str(tmp_path / "page.html")]) == 0
    browser.get((tmp_path / "page.html").as_uri())
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#score-usefulness svg rect"))
    shown = {section.get_attribute("id") for section in browser.find_elements(By.TAG_NAME, "section") if section.text}
    assert "scores" in shown and ("training" in shown) == with_run
    bars = browser.find_elements(By.CSS_SELECTOR, "#score-usefulness .bars")
    assert [len(group.find_elements(By.TAG_NAME, "rect")) for group in bars] == [NUM_LAYERS] * 2
    assert len(browser.find_elements(By.CSS_SELECTOR, "#score-effective_depth .series")) == 2
    for index in range(2):
        assert find(browser, f"#score-permutation-{index} canvas").is_displayed()

    scores = json.loads((tmp_path / "gpt2" / "scores.json").read_text(encoding="utf-8"))["scores"]
    rows = scores["usefulness"]["tables"]["usefulness"]
    find(browser, "#score-usefulness svg").send_keys(Keys.END)
    head, values = tooltip(browser)
    assert head == f"layer {NUM_LAYERS - 1}" and list(values) == ["llama", "gpt2"]
    assert number(values["gpt2"].split(" ")[0]) == pytest.approx(rows[-1]["usefulness"], rel=1e-3)
    click(browser, "#score-usefulness .table")
    _, _, body = table(browser, "score-usefulness")
    assert [number(row[4]) for row in body] == pytest.approx([row["usefulness"] for row in rows], rel=1e-5)
    assert "causal · causal" in find(browser, "#score-table").text

    click(browser, f".run-toggle:nth-of-type({1 + with_run})")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#score-usefulness .bars")) == 1
    assert not browser.find_elements(By.ID, "score-causal-0")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
