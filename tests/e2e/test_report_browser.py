"""The report page in a real browser, opened from disk without a network: what it draws and lets a reader change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.cli.main import main
from tests.unit.analysis.run_files import loss, out_var, write_run

selenium = pytest.importorskip("selenium", reason="needs the selenium package (extra `dev`)")

from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1360,1000",
)
LAYERS, STEPS, EXPERTS, SCALE = 6, range(1, 41), 8, 0.3


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for the module, with a profile of its own and no way out."""
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(DRIVER))
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a MoE run in one page, written by the command."""
    folder = tmp_path_factory.mktemp("report")
    dense = write_run(folder / "dense", num_layers=LAYERS, steps=STEPS, everything=True)
    moe = write_run(folder / "moe", num_layers=LAYERS, steps=STEPS, scale=SCALE, num_experts=EXPERTS, everything=True)
    output = folder / "page.html"
    assert main(["report", str(dense), str(moe), "--output", str(output)]) == 0
    return output


@pytest.fixture
def page(browser: Chrome, page_file: Path) -> Iterator[Chrome]:
    """The page freshly opened in the light theme; the test fails if the console then holds a warning or an error."""
    set_theme_preference(browser, "light")
    browser.get(page_file.as_uri())
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#depth-chart svg .series"))
    yield browser
    problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert not problems


def set_theme_preference(browser: Chrome, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for(browser: Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def next_frame(browser: Chrome) -> None:
    """Until a change made before has been drawn."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def find(page: Chrome, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def click(page: Chrome, selector: str) -> None:
    page.execute_script("arguments[0].click()", find(page, selector))
    next_frame(page)


def points(page: Chrome, figure: str) -> list[int]:
    """Number of points of each line of a chart, from its drawn path."""
    paths = page.find_elements(By.CSS_SELECTOR, f"#{figure} .series path")
    return [len(re.findall("[ML]", path.get_attribute("d") or "")) for path in paths]


def table(page: Chrome, figure: str) -> tuple[str, list[str], list[list[str]]]:
    """Caption, column heads and body of a figure's table."""
    read = """
        const table = document.querySelector(arguments[0] + " table");
        const cells = (row) => [...row.cells].map((cell) => cell.textContent);
        return [table.caption.textContent, cells(table.tHead.rows[0]), [...table.tBodies[0].rows].map(cells)];
    """
    caption, head, body = page.execute_script(read, f"#{figure}")
    return caption, head, body


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def tooltip(page: Chrome) -> tuple[str, dict[str, str]]:
    box = find(page, "#tooltip")
    assert box.is_displayed()
    names = [entry.text for entry in box.find_elements(By.TAG_NAME, "dt")]
    values = [entry.text for entry in box.find_elements(By.TAG_NAME, "dd")]
    return box.find_element(By.TAG_NAME, "p").text, dict(zip(names, values, strict=True))


def move_slider(page: Chrome, index: int) -> None:
    script = "const s = arguments[0]; s.value = arguments[1]; s.dispatchEvent(new Event('input', {bubbles: true}))"
    page.execute_script(script, find(page, "#position"), index)
    next_frame(page)


def test_page_loads_nothing_but_itself(page: Chrome) -> None:
    assert page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert find(page, "h1").text == "dense, moe"
    cards = [card.text for card in page.find_elements(By.CLASS_NAME, "card")]
    assert len(cards) == 2 and "top 2 of 8" in cards[1]


def test_every_chart_has_the_points_of_the_files(page: Chrome) -> None:
    assert points(page, "depth-chart") == [LAYERS, LAYERS]
    assert points(page, "layers-0") == [len(STEPS)] * LAYERS
    assert points(page, "metric-lr") == [len(STEPS)] * 2
    assert points(page, "metric-loss") == [len(STEPS)] * 2 + [1, 1]  # the validation loss of the last step
    assert points(page, "all-my_own_number") == [LAYERS, LAYERS]
    assert points(page, "all-load_entropy") == [LAYERS]  # the dense run has none
    assert len(page.find_elements(By.CSS_SELECTOR, "#router-maps .heat-map")) == 1


def test_pointer_shows_the_value_under_it(page: Chrome) -> None:
    chart = find(page, "#depth-chart svg")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    dot = page.find_elements(By.CSS_SELECTOR, "#depth-chart .series:nth-of-type(1) circle")[3]
    ActionChains(page).move_to_element(dot).perform()
    head, values = tooltip(page)
    assert head == "layer 3"
    assert number(values["dense · step 40"]) == pytest.approx(out_var(40, 3), rel=1e-3)
    assert number(values["moe · step 40"]) == pytest.approx(out_var(40, 3, scale=SCALE), rel=1e-3)
    ActionChains(page).move_to_element(find(page, "#depth-title")).perform()
    assert not find(page, "#tooltip").is_displayed()


def test_keyboard_reads_the_same_values_aloud(page: Chrome) -> None:
    chart = find(page, "#metric-loss svg")
    page.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    head, values = tooltip(page)
    assert head == "step 3"
    assert number(values["dense"]) == pytest.approx(loss(3), rel=1e-3)
    assert find(page, "#announcer").get_attribute("textContent") == "step 3: " + ", ".join(
        f"{name} {value}" for name, value in values.items()
    )
    chart.send_keys(Keys.ESCAPE)
    assert not find(page, "#tooltip").is_displayed()


def test_heat_map_cells_are_read_by_layer_and_step(page: Chrome) -> None:
    chart = find(page, "#heat-1 svg")
    page.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 9, *[Keys.ARROW_UP] * 4)
    head, values = tooltip(page)
    assert (head, list(values)) == ("step 10", ["layer 4"])
    assert number(values["layer 4"]) == pytest.approx(out_var(10, 4, scale=SCALE), rel=1e-3)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    width, height = int(chart.size["width"]), int(chart.size["height"])
    ActionChains(page).move_to_element_with_offset(chart, width // 2 - 16, -height // 2 + 14).perform()
    head, values = tooltip(page)
    assert (head, list(values)) == ("step 40", [f"layer {LAYERS - 1}"])
    shades = """
        const { width, height } = arguments[0];
        const { data } = arguments[0].getContext("2d").getImageData(0, 0, width, height);
        return arguments[1].map(([x, y]) => [...data.slice(4 * (y * width + x), 4 * (y * width + x) + 4)]);
    """
    bottom_left_and_top_right = [(62, height - 42), (width - 16, 14)]
    dark, light = page.execute_script(shades, find(page, "#heat-1 canvas"), bottom_left_and_top_right)
    assert sum(dark[:3]) < sum(light[:3])
    assert dark[3] == light[3] == 255


def test_router_map_shows_tokens_and_share(page: Chrome) -> None:
    chart = find(page, "#router-maps svg")
    page.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.END)
    head, values = tooltip(page)
    click(page, "#router-maps .table")
    caption, columns, body = table(page, "router-tokens_per_expert-1")
    assert caption == "tokens_per_expert of moe at step 40" and len(columns) == EXPERTS + 1
    counts = [number(cell) for cell in body[0][1:]]
    assert head == f"expert {EXPERTS - 1}"
    tokens, share = values["layer 0"].split(" ", 1)
    assert number(tokens) == counts[-1]
    assert share == f"({counts[-1] / (sum(counts) / EXPERTS):.2f}× equal share)"


def test_slider_and_kept_steps(page: Chrome) -> None:
    move_slider(page, 4)
    assert find(page, "#position-value").text == "step 5"
    click(page, "#pin")
    move_slider(page, 19)
    assert points(page, "depth-chart") == [LAYERS] * 4
    click(page, "#depth-chart .table")
    _, head, body = table(page, "depth-chart")
    assert head == ["layer", "dense, step 5", "moe, step 5", "dense, step 20", "moe, step 20"]
    for layer, row in enumerate(body):
        expected = [layer, *(out_var(step, layer, scale=scale) for step in (5, 20) for scale in (1.0, SCALE))]
        assert [number(cell) for cell in row] == pytest.approx(expected, rel=5e-5)
    assert find(page, "#all-cos .subtitle").text == "step 11"  # collected every tenth step
    click(page, "#pins button")
    assert points(page, "depth-chart") == [LAYERS] * 2


def test_tables_hold_every_number(page: Chrome) -> None:
    assert len(page.find_elements(By.CSS_SELECTOR, "figure table")) == 0
    click(page, "#tables-toggle")
    figures = page.find_elements(By.TAG_NAME, "figure")
    assert len(page.find_elements(By.CSS_SELECTOR, "figure table caption")) == len(figures) > 15
    caption, head, body = table(page, "heat-0")
    assert caption == "out_var of dense over training, by layer"
    assert head == ["step", "tokens", *(f"layer {layer}" for layer in range(LAYERS))]
    for step, row in zip(STEPS, body, strict=True):
        expected = [step, step * 512, *(out_var(step, layer) for layer in range(LAYERS))]
        assert [number(cell) for cell in row] == pytest.approx(expected, rel=5e-5)
    _, head, body = table(page, "metric-loss")
    assert head == ["step", "tokens", "dense", "moe", "dense validation", "moe validation"]
    assert [number(cell) for cell in body[-1]] == pytest.approx(
        [40, 40 * 512, loss(40), loss(40), loss(40) + 0.05, loss(40) + 0.05], rel=5e-6
    )
    scopes = page.execute_script("return [...document.querySelectorAll('th')].map((cell) => cell.scope)")
    assert set(scopes) == {"row", "col"}


def test_legend_takes_a_run_off_every_chart(page: Chrome) -> None:
    click(page, ".run-toggle")
    assert points(page, "depth-chart") == [LAYERS]
    assert points(page, "metric-lr") == [len(STEPS)]
    assert not page.find_elements(By.ID, "heat-0") and page.find_elements(By.ID, "heat-1")
    click(page, ".run-toggle:nth-of-type(2)")
    assert not page.find_elements(By.TAG_NAME, "figure")
    click(page, ".run-toggle")
    assert points(page, "depth-chart") == [LAYERS]


def test_statistic_axis_and_scale_are_choices(page: Chrome) -> None:
    Select(find(page, "#statistic")).select_by_visible_text("out_skew")
    next_frame(page)
    assert points(page, "layers-0") == [4] * LAYERS
    assert not find(page, "#statistic-log").is_selected()
    click(page, "#statistic-log")
    assert sum(points(page, "depth-chart")) < 2 * LAYERS  # no logarithm of a negative skewness
    click(page, "#all-attn_var .title-button")
    assert Select(find(page, "#statistic")).first_selected_option.text == "attn_var"
    click(page, "input[value=tokens]")
    assert find(page, "#position-value").text == "20.48k tokens"
    titles = page.find_elements(By.CSS_SELECTOR, "#training-charts .axis-title")
    assert {title.text for title in titles} == {"tokens"}
    pressed = find(page, "#metric-loss .log").get_attribute("aria-pressed")
    click(page, "#metric-loss .log")
    assert (pressed, find(page, "#metric-loss .log").get_attribute("aria-pressed")) == ("false", "true")


def background(page: Chrome) -> int:
    color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_theme_follows_the_system_and_the_button(page: Chrome) -> None:
    light = background(page)
    click(page, "#theme-toggle")
    dark = background(page)
    assert dark < 150 < 600 < light
    click(page, "#theme-toggle")
    assert background(page) == light
    set_theme_preference(page, "dark")
    wait_for(page, lambda: background(page) == dark)


@pytest.mark.parametrize("width", [360, 800, 1800])
def test_nothing_is_wider_than_the_window(page: Chrome, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        click(page, "#tables-toggle")
        wait_for(page, lambda: find(page, "#depth-chart svg").size["width"] < width)
        next_frame(page)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
