"""report.json, and the page made from it alone."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.errors import SettingsError
from server.report.page import page_of, render_report, verdict
from server.report.report import read_report, save_report
from tests.support.reports import HOSTILE, hand_written


class Page(HTMLParser):
    """What a page shows, what it fetches, and whether it runs anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.outside, self.tags, self.ids = "", [], set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        links = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.outside += [link for link in links if not link.startswith("#") and link != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "p", "li", "dt", "dd"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(report: dict[str, Any]) -> str:
    return " ".join(Page(page_of(report)).text.replace("\u00a0", " ").split())


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = Page(page_of(hand_written()))
    assert page.outside == []
    assert "script" not in page.tags
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_every_id_of_the_page_stands_once() -> None:
    page = Page(page_of(hand_written()))
    assert len(page.ids) == len(set(page.ids))


def test_the_same_report_gives_the_same_bytes() -> None:
    assert page_of(hand_written()) == page_of(hand_written())


def test_the_page_shows_what_the_report_says_and_escapes_words() -> None:
    text = shown(hand_written())
    for each in (
        HOSTILE,
        "<i>good</i>",
        "0.312▲ 50.0",  # the base on ada's rows, beside 0.8125
        "regmean@0.9 (chosen)",
        "fisher did better",
        "LoRA adapter of rank 8",
        "25.0 %",
        "1.2e+04",
        "20.0 MB from the owners",
        "01234 56789 01234 56789",
        "a" * 64,
        "python 3.11",
    ):
        assert each in text, each


def test_words_that_an_owner_could_choose_are_escaped_wherever_they_stand() -> None:
    report = hand_written()
    word = "<img src=x onerror=alert(1)>$x_y$"
    report["owners"] = [word, "bea"]
    report["lost"] = {word: word}
    report["receipts"] = report["notes"] = report["advice"] = [word]
    report["tensors"]["averaged"] = [word]
    report["layers"][0]["name"] = report["changes"][0]["name"] = word
    report["agreement"]["base"] = report["agreement"]["task"]["labels"][0] = word
    report["agreement"]["owners"][0]["name"] = word
    report["evaluation"]["by_owner"] = {word: report["evaluation"]["by_owner"]["ada"]}
    report["sums"][0]["owners"] = report["sent"][0]["owners"] = [word]
    report["sums"][0]["statistic"] = report["sent"][0]["model"] = report["steps"][0]["name"] = word
    report["sums"][0]["contents"][0]["tensors"] = [word]
    report["steps"][0]["by_owner"] = {word: report["steps"][0]["by_owner"]["ada"]}
    report["versions"][word] = word
    page = Page(page_of(report))
    assert "img" not in page.tags
    assert page.text.count(word) > 20


def test_the_page_says_that_a_plain_sum_hides_nothing() -> None:
    text = shown(hand_written())
    assert "the coordinator saw each owner's vector" in text
    assert "Yes, all of them." in text


def test_the_page_says_that_a_masked_sum_hides_single_owners_and_from_how_many() -> None:
    report = hand_written()
    report["summation"] = report["agreement"]["summation"]["kind"] = "masked"
    report["agreement"]["summation"]["colluders"] = 2
    text = shown(report)
    assert "saw each owner's vector" not in text
    assert "stay so even if it cheats and up to 2 of the 3 owners help it" in text
    assert "where it sends what it solved" not in text
    first = next(each for each in report["sums"] if each["statistic"] == "contribution")
    report["sums"].append({**first, "statistic": "refit 1"})
    assert "where it sends what it solved" in shown(report)


def test_the_page_says_who_was_lost_where_and_that_its_numbers_are_in_no_sum() -> None:
    text = shown(hand_written())
    assert "Owner cyd was lost at: sum of contribution. Its part is not in the merged model." in text
    assert "cyd sum of contribution no sum" in text


def test_an_owner_lost_after_its_numbers_were_summed_is_said_to_be_in_that_sum() -> None:
    report = hand_written()
    report["sums"][0]["owners"].append("cyd")
    report["owners"].append("cyd")
    report["lost"]["cyd"] = "sum of test"
    text = shown(report)
    assert "Owner cyd was lost at: sum of test. Its part is in the merged model." in text
    assert "cyd sum of test contribution" in text


def test_a_total_that_was_not_destroyed_is_said_to_be_there() -> None:
    report = hand_written()
    assert "not destroyed" not in shown(report)
    report["sums"][0]["destroyed"] = False
    text = shown(report)
    assert "not destroyed" in text
    assert "overwrote them after the solve" not in text


def test_figures_that_an_owner_keeps_to_itself_are_not_promised_by_name() -> None:
    assert "No of bea: means only" in shown(hand_written())


def test_a_simulation_is_called_one() -> None:
    report = hand_written()
    assert "This was a simulation" not in shown(report)
    report["simulated"] = True
    assert "This was a simulation" in shown(report)


def test_the_verdict_names_what_is_better_and_what_is_worse() -> None:
    # 400 rows of ada, 400 of bea whose figures are hidden: 1.96 sqrt(2 * 0.75 * 0.25 / 800) = 0.042
    assert verdict(hand_written()).replace("\u00a0", " ") == (
        "The merged model (RegMean) is right on 75.0 % of the owners' test rows: better than the plain average "
        "(62.5 %) and the base model (25.0 %); worse than each owner's own model at home (87.5 %) and Fisher averaging "
        "(81.2 %)."
    )


def test_the_verdict_does_not_call_better_what_chance_explains() -> None:
    report = hand_written()
    mean = report["evaluation"]["mean"]
    mean["average"]["accuracy"], mean["fisher"]["accuracy"] = 0.71, 0.79
    said = verdict(report)
    assert "not clearly different from Fisher averaging (79.0\u00a0%) and the plain average (71.0\u00a0%)" in said
    mean["average"]["accuracy"] = 0.70
    assert "better than the plain average (70.0\u00a0%)" in verdict(report)


@pytest.mark.parametrize("owners", [2, 30])
def test_many_owners_and_few_fit_on_the_page(owners: int) -> None:
    report = hand_written()
    names = [f"owner-{number}" for number in range(owners)]
    report["owners"] = names
    report["steps"][0]["by_owner"] = dict.fromkeys(names, report["steps"][0]["by_owner"]["ada"])
    assert ("the others" in shown(report)) == (owners > 7)


def test_a_report_without_grams_knobs_or_single_figures_has_a_page() -> None:
    report = hand_written()
    report["layers"], report["low_rank"], report["examples"] = [], None, None
    report["evaluation"]["sweep"], report["evaluation"]["by_owner"] = {}, {}
    report["chosen"]["regmean"] = {"candidate": "regmean", "knob": None}
    for change in report["changes"]:
        change["from_average"] = None
    text = shown(report)
    assert "had one candidate" in text
    assert "Condition" not in text


def test_the_page_lies_beside_the_report(tmp_path: Path) -> None:
    save_report(hand_written(), tmp_path)
    assert render_report(tmp_path).read_text() == page_of(hand_written())


def test_a_missing_or_foreign_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"report_version": 99}))
    with pytest.raises(SettingsError, match="report_version is 99, this reads 2"):
        read_report(tmp_path)
