"""report.json and the page made from it alone."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.errors import SettingsError
from server.report import read_report, render_report, save_report

FIGURES = {"accuracy": 0.75, "macro_f1": 0.5, "pooled_accuracy": 0.7, "rows": 100}
REPORT: dict[str, Any] = {
    "report_version": 1,
    "title": "Ward <b>7</b> & others",
    "method": "regmean",
    "summation": "plain",
    "seconds": 12.5,
    "owners": ["ada", "bea"],
    "lost": {"cyd": "roll call"},
    "chosen": {"regmean": {"candidate": "regmean@0.9", "knob": 0.9}},
    "evaluation": {
        "choose_by": "macro_f1",
        "figure": "macro_f1",
        "label_set": "own",
        "mean": dict.fromkeys(("base", "own_at_home", "regmean"), FIGURES),
        "by_owner": {"ada": dict.fromkeys(("base", "own_at_home", "regmean"), FIGURES)},
        "sweep": {"regmean": [{"candidate": "regmean@0.9", "accuracy": 0.7, "macro_f1": 0.6}]},
    },
    "layers": [
        {
            "name": "l0",
            "status": "empty",
            "d_in": 8,
            "gram_size": 9,
            "rows": 0,
            "condition": None,
            "effective_rank": None,
            "unseen_directions": 8,
        }
    ],
    "low_rank": {
        "rank": 8,
        "relative_error": 0.25,
        "dropped": 0.5,
        "layers": [{"name": "l0.weight", "relative_error": 0.125}],
    },
    "tensors": {"merged": [["l0.weight"]], "data_free": [], "averaged": ["bias"], "left_alone": []},
    "notes": ["l0: empty"],
    "advice": ["fisher did better"],
    "steps": [{"name": "roll call", "seconds": 0.1, "bytes_sent": 0, "bytes_received": 10**7}],
    "examples": 100,
    "digests": {"agreement": "a" * 64, "base": "b" * 64, "model": "c" * 64},
    "versions": {"python": "3.11"},
}


class Page(HTMLParser):
    """What a page shows, what it fetches, and whether it runs anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.outside, self.tags = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    save_report(REPORT, tmp_path)
    return Page(render_report(tmp_path).read_text())


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    assert page.outside == []
    assert "script" not in page.tags


def test_the_page_shows_what_the_report_says_and_escapes_names(page: Page) -> None:
    for shown in (
        "Ward <b>7</b> & others",
        "0.750",
        "regmean@0.9 (chosen)",
        "cyd was lost at: roll call",
        "10.0",
        "fisher did better",
        "LoRA adapter of rank 8",
        "25.0 %",
        "0.125",
    ):
        assert shown in page.text


def test_the_page_says_that_a_plain_sum_hides_nothing(page: Page) -> None:
    assert "the coordinator saw each owner's vector" in page.text


def test_a_missing_or_foreign_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"report_version": 99}))
    with pytest.raises(SettingsError, match="report_version is 99, this reads 1"):
        read_report(tmp_path)
