"""The pages of a real and of a hand-written report, opened from disk in headless Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from common.page.words import capitalised
from server.report.page import render_report
from server.report.report import Report, read_report, save_report
from tests.support.programs import required_program
from tests.support.reports import HOSTILE, as_report, hand_written, of_many

SECTIONS = ["verdict", "metrics", "choice", "revealed", "layers", "cost", "agreement", "digests"]
DESKTOP, TABLET, PHONE = 1280, 768, 390  # CSS pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = required_program("chromium", "chromium-browser", "google-chrome", package="chromium")
    driver_program = required_program("chromedriver", package="chromium-driver")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # the page is our own, and the tests may run as root
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hostile")
    save_report(as_report(hand_written()), output)
    render_report(output)
    return output


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of 100 owners with long names."""
    output = tmp_path_factory.mktemp("crowd")
    save_report(as_report(of_many([f"hospital-in-some-town-{number}" for number in range(100)])), output)
    render_report(output)
    return output


@pytest.fixture(params=["example_run", "hostile"])
def output(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(params=["example_run", "hostile", "crowd"])
def layout(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def show(browser: webdriver.Chrome, output: Path, width: int = DESKTOP, scheme: str = "light") -> Report:
    """Open the page; the report that it was made from."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((output / "report.html").as_uri())
    return read_report(output)


def test_the_browser_logs_nothing_and_no_request_leaves_the_page(browser: webdriver.Chrome, output: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    show(browser, output)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    page = (output / "report.html").as_uri()
    assert page in asked
    # Chromium may still be loading its own first page, whose addresses no other page may ask for.
    assert {url for url in asked if not url.startswith(("data:", "chrome:"))} == {page}


def test_every_section_is_there_and_reached_from_the_top(browser: webdriver.Chrome, output: Path) -> None:
    show(browser, output)
    assert [each.get_attribute("id") for each in browser.find_elements(By.TAG_NAME, "section")] == SECTIONS
    for link in browser.find_elements(By.CSS_SELECTOR, "nav a"):
        target = (link.get_attribute("href") or "").rpartition("#")[2]
        assert browser.find_element(By.ID, target).is_displayed()
    for plot in browser.find_elements(By.TAG_NAME, "svg"):
        assert plot.size["width"] > 300
        assert plot.size["height"] > 100


def test_the_table_has_the_report_s_metrics(browser: webdriver.Chrome, output: Path) -> None:
    evaluation = show(browser, output).evaluation
    rows = {"mean": evaluation.mean, **evaluation.by_owner}
    expected = {
        f"{row}/{model}/{key}": f"{getattr(scores, key):.3f}"
        for row, models in rows.items()
        for model, scores in models.items()
        for key in ("accuracy", "metric")
    }
    cells = browser.find_elements(By.CSS_SELECTOR, "[data-cell]")
    shown = {each.get_attribute("data-cell"): each.find_element(By.TAG_NAME, "span") for each in cells}
    assert {name: each.get_property("textContent") for name, each in shown.items()} == expected


def test_the_rounds_and_who_is_in_them_are_the_report_s(browser: webdriver.Chrome, output: Path) -> None:
    report = show(browser, output)
    rows = browser.find_elements(By.CSS_SELECTOR, "#rounds tbody tr")
    assert len(rows) == len(report.rounds)
    for row, summed in zip(rows, report.rounds, strict=True):
        assert capitalised(summed.title) in row.text
        assert f"{summed.numbers:,} numbers" in row.text
        for owner in summed.owners:
            assert owner in row.text
        for content in summed.contents:
            assert content.meaning in row.text


def test_words_from_settings_are_shown_as_written(browser: webdriver.Chrome, hostile: Path) -> None:
    show(browser, hostile)
    assert browser.find_element(By.TAG_NAME, "h1").text == HOSTILE
    assert browser.find_elements(By.TAG_NAME, "script") == []


@pytest.mark.parametrize("width", [DESKTOP, TABLET, PHONE])
def test_the_page_is_no_wider_than_the_screen(browser: webdriver.Chrome, layout: Path, width: int) -> None:
    show(browser, layout, width)
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.innerWidth") == width


@pytest.mark.parametrize("width", [DESKTOP, TABLET, PHONE])
def test_no_owner_s_name_is_broken_and_what_each_owner_gains_fits(
    browser: webdriver.Chrome, layout: Path, width: int
) -> None:
    show(browser, layout, width)
    names = browser.find_elements(By.CSS_SELECTOR, "#verdict .name, #revealed .name, #agreement .name, .gains .name")
    assert names
    broken = "return arguments[0].filter(each => each.getClientRects().length > 1).map(each => each.textContent)"
    assert browser.execute_script(broken, names) == []
    for table in browser.find_elements(By.CSS_SELECTOR, ".gains"):
        assert browser.execute_script(
            "return arguments[0].scrollWidth <= arguments[0].parentElement.clientWidth", table
        )


def test_the_plot_is_beside_the_table_on_a_desktop_and_below_it_on_a_phone(
    browser: webdriver.Chrome, layout: Path
) -> None:
    for width, is_beside in ((1100, True), (DESKTOP, True), (TABLET, False), (PHONE, False)):
        show(browser, layout, width)
        table = browser.find_element(By.CSS_SELECTOR, ".scroll:has(.gains)").rect
        plot = browser.find_element(By.CSS_SELECTOR, "#metrics svg").rect
        assert (plot["x"] >= table["x"] + table["width"]) == is_beside
        assert (plot["y"] >= table["y"] + table["height"]) != is_beside


def test_a_table_that_is_wider_than_the_screen_says_so(browser: webdriver.Chrome, layout: Path) -> None:
    for width in (DESKTOP, TABLET, PHONE):
        show(browser, layout, width)
        for hint in browser.find_elements(By.CSS_SELECTOR, "#metrics > .hint"):
            table = browser.find_element(By.CSS_SELECTOR, "#metrics > .scroll")
            overflows = browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", table)
            assert hint.is_displayed() or not overflows


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: webdriver.Chrome, output: Path, scheme: str) -> None:
    """Contrast of 4.5 to 1 or more (WCAG 2, AA), for every element that has text of its own, in plots as well."""
    show(browser, output, scheme=scheme)
    faint = browser.execute_script(
        """
        const parse = colour => colour.match(/[\\d.]+/g).map(Number);
        const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const ground = element => {
          for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
          }
        };
        return [...document.body.querySelectorAll("*")]
          .filter(each => [...each.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
          .filter(each => !each.closest("defs, style"))
          .map(each => {
            const style = getComputedStyle(each);
            const ink = luminance(parse(each.closest("svg") ? style.fill : style.color));
            const paper = luminance(ground(each.closest("svg") ? each.closest("svg").parentElement : each));
            const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            return [each.textContent.trim().slice(0, 40), contrast];
          })
          .filter(([, contrast]) => contrast < 4.5);
        """
    )
    assert faint == []


def test_the_page_prints(browser: webdriver.Chrome, output: Path) -> None:
    show(browser, output)
    assert browser.print_page().startswith("JVBERi0")  # %PDF- in base64
