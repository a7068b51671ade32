"""A table of compressions in a real browser: every row is there, and a column's title sorts by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main

pytest.importorskip("selenium", reason="needs the selenium package (extra `dev`)")

from selenium.webdriver import Chrome  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from tests.e2e.test_report_browser import (  # noqa: E402
    browser,  # noqa: F401
    number,
    pytestmark,  # noqa: F401
    table,
    wait_for,
)


def row(method: str, loss: float, seconds: float | None) -> dict[str, object]:
    perplexity = {"perplexity": loss, "loss_low": None, "loss_high": None}
    return {
        "method": method,
        "pattern": "" if method == "dense" else "0.5",
        "perplexity": perplexity,
        "nonzero_parameters": 10,
        "bytes": 40,
        "seconds": seconds,
    }


def test_columns_sort_by_their_numbers_and_empty_cells_come_last(
    browser: Chrome,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [row("dense", 9.0, None), row("wanda", 100.0, 2.0), row("obs", 20.0, 10.0)]
    content = {"command": "sparsecod compress", "rows": rows, "warnings": ["a sentence"]}
    (tmp_path / "table.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    browser.get((tmp_path / "page.html").as_uri())
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#compression-tables tbody tr"))
    _, head, body = table(browser, "compression-tables")
    assert [cells[0] for cells in body] == ["dense", "wanda 0.5", "obs 0.5"]
    shown = {section.get_attribute("id") for section in browser.find_elements(By.TAG_NAME, "section") if section.text}
    assert shown == {"compressions"} and "a sentence" in browser.page_source
    for title, orders in (
        ("perplexity [95 %]", (["dense", "obs 0.5", "wanda 0.5"], ["wanda 0.5", "obs 0.5", "dense"])),
        ("seconds", (["wanda 0.5", "obs 0.5", "dense"], ["obs 0.5", "wanda 0.5", "dense"])),
        ("method, pattern", (["dense", "obs 0.5", "wanda 0.5"], ["wanda 0.5", "obs 0.5", "dense"])),
    ):
        column = head.index(title)
        for order, word in zip(orders, ("ascending", "descending"), strict=True):
            button = browser.find_elements(By.CSS_SELECTOR, "#compression-tables th .sort")[column]
            browser.execute_script("arguments[0].click()", button)
            _, _, body = table(browser, "compression-tables")
            assert [cells[0] for cells in body] == order
            marked = browser.find_elements(By.CSS_SELECTOR, "#compression-tables th[aria-sort]")
            assert [each.get_attribute("aria-sort") for each in marked] == [word]
    assert number(body[-1][head.index("perplexity [95 %]")]) == 9
