"""report.json, and the page made from it alone."""

import io
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from common.errors import SettingsError
from common.page.table import as_json
from deploy.commands.table import print_report
from server.output_folder import PROGRESS
from server.report.heat_map import STEPS, tints
from server.report.page import page_of, render_report
from server.report.report import MAX_REPORT_BYTES, read_report, save_report, schema_text
from server.report.verdict import verdict
from tests.support.reports import HOSTILE, as_report, hand_written, of_many

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "docs" / "report.schema.json"


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
    return " ".join(Page(page_of(as_report(report))).text.replace("\u00a0", " ").split())


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = Page(page_of(as_report(hand_written())))
    assert page.outside == []
    assert "script" not in page.tags
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_every_id_of_the_page_is_unique() -> None:
    page = Page(page_of(as_report(hand_written())))
    assert len(page.ids) == len(set(page.ids))


def test_the_same_report_gives_the_same_bytes() -> None:
    assert page_of(as_report(hand_written())) == page_of(as_report(hand_written()))


def test_the_page_says_by_whom_the_merge_was_verified_and_of_what() -> None:
    verified = (
        "Verified by all owners: before anything was measured on a model, ada and bea verified together that it is the "
        "merge of what they contributed. A coordinator that colludes with an owner could evade this, and where hardly "
        "any row reaches, a difference could remain."
    )
    added_up = "They see what was solved from them, and verified it; the totals of metrics they added up themselves."
    report = hand_written() | {"verified": True, "summation": "masked"}
    assert verified in shown(report)
    assert added_up in shown(report)
    text = shown(hand_written() | {"summation": "masked"})
    assert "They see what was solved from them." in text
    assert "Verified by all owners" not in text
    assert "verified it" not in text


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
        "The owners sent 20.0 MB and received 2.0 kB.",
        "01234 56789 01234 56789",
        "a" * 64,
        "python 3.11",
        "Token embeddings show which tokens occur.",
    ):
        assert each in text, each


def test_words_that_an_owner_could_choose_are_escaped_everywhere() -> None:
    report = hand_written()
    word = "<img src=x onerror=alert(1)>$x_y$"
    report["owners"] = [word, "bea"]
    report["dropped_out"] = {word: word}
    report["receipts"] = report["notes"] = report["advice"] = report["disclosures"] = [word]
    report["tensors"]["averaged"] = [word]
    report["layers"][0]["name"] = report["changes"][0]["name"] = word
    report["agreement"]["base"] = report["agreement"]["task"]["labels"][0] = word
    report["agreement"]["owners"][0]["name"] = word
    report["evaluation"]["by_owner"] = {word: report["evaluation"]["by_owner"]["ada"]}
    report["rounds"][0]["owners"] = report["sent"][0]["owners"] = [word]
    report["rounds"][0]["title"] = report["sent"][0]["title"] = report["steps"][0]["title"] = word
    report["steps"][0]["phase"] = word
    report["rounds"][0]["contents"][0] |= {"meaning": word, "tensors": [word]}
    for described in report["methods"].values():
        described.update(dict.fromkeys(described, word))
    for trial in (report["chosen"]["regmean"], report["evaluation"]["sweep"]["regmean"][1]):
        trial["candidate"] = word
    report["steps"][0]["by_owner"] = {word: report["steps"][0]["by_owner"]["ada"]}
    report["versions"][word] = word
    page = Page(page_of(as_report(report)))
    assert "img" not in page.tags
    assert page.text.count(word) > 20


def test_the_page_says_that_a_plain_sum_hides_nothing() -> None:
    text = shown(hand_written())
    assert "the coordinator saw each owner's vector" in text
    assert "Yes, all of them." in text


def test_the_page_says_that_a_masked_sum_hides_single_owners_and_from_how_many() -> None:
    report = hand_written()
    report["summation"] = "masked"
    report["agreement"]["colluders"] = 2
    text = shown(report)
    assert "saw each owner's vector" not in text
    assert "They stay hidden from a malicious coordinator with up to 2 colluding owners of 3." in text
    assert "only if the coordinator sends what it solved" not in text
    first = next(each for each in report["rounds"] if each["kind"] == "contribution")
    report["rounds"].append({**first, "kind": "step", "method": "refit", "step": 1, "title": "refit, step 1"})
    assert "only if the coordinator sends what it solved" in shown(report)


def test_the_page_says_who_dropped_out_and_that_its_numbers_are_in_no_round() -> None:
    text = shown(hand_written())
    assert "Owner cyd dropped out at: contributions. Its numbers are not in the merged model." in text
    assert "cyd contributions no round" in text


def test_an_owner_that_drops_out_after_its_numbers_were_summed_is_in_that_round() -> None:
    report = hand_written()
    report["rounds"][0]["owners"].append("cyd")
    report["owners"].append("cyd")
    report["dropped_out"]["cyd"] = "test metrics"
    text = shown(report)
    assert "Owner cyd dropped out at: test metrics. Its numbers are in the merged model." in text
    assert "cyd test metrics contributions" in text


def test_the_page_says_which_total_was_not_destroyed() -> None:
    report = hand_written()
    assert "not destroyed" not in shown(report)
    report["rounds"][0]["destroyed"] = False
    text = shown(report)
    assert "not destroyed" in text
    assert "overwrote what its memory held" not in text


def test_metrics_that_an_owner_keeps_to_itself_are_not_shown_by_name() -> None:
    assert "No for bea: means only" in shown(hand_written())


def test_a_simulation_is_called_one() -> None:
    report = hand_written()
    assert "This was a simulation" not in shown(report)
    report["simulated"] = True
    assert "This was a simulation" in shown(report)


def said(report: dict[str, Any]) -> list[str]:
    return [sentence.replace("\u00a0", " ").replace("\u2212", "-") for sentence in verdict(as_report(report))]


def test_the_verdict_names_what_is_better_and_what_is_worse() -> None:
    # 400 rows of ada, 400 of bea whose metrics are hidden: 1.96 sqrt(2 * 0.75 * 0.25 / 800) = 0.042
    assert said(hand_written()) == [
        "For ada, the merged model is worse than its own model at home (-12.5 percentage points).",
        "bea shows its metrics only in the mean, so nobody else knows what it gains or loses.",
        "On average over 2 owners, the merged model (RegMean) is right on 75.0 % of the test rows, and each "
        "owner's own model at home on 87.5 %: worse (-12.5 percentage points).",
        "On average over the owners, it is better than the plain average (62.5 %) and the base model (25.0 %).",
        "It is worse than Fisher averaging (81.2 %).",
    ]


def with_owners(report: dict[str, Any], accuracies: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The report with these owners, by name their accuracy with the merged model and with their own, on 400 rows."""
    report["owners"] = list(accuracies)
    for summed in report["rounds"]:
        summed["owners"] = list(accuracies)
    report["agreement"]["owners"] = [report["agreement"]["owners"][0] | {"name": name} for name in accuracies]
    scores = report["evaluation"]["by_owner"].pop("ada")
    for name, pair in accuracies.items():
        shares = zip(("regmean", "own_at_home"), pair, strict=True)
        changed = {model: scores[model] | {"accuracy": share} for model, share in shares}
        report["evaluation"]["by_owner"][name] = scores | changed
    return report


def test_the_verdict_says_first_who_gains_and_who_loses_and_what_may_be_chance() -> None:
    # on 400 rows and near 0.8, 1.96 sqrt(2 * 0.8 * 0.2 / 400) = 0.055
    owners = {"ada": (0.86, 0.80), "bea": (0.78, 0.80), "cyd": (0.70, 0.80), "dan": (0.95, 0.80), "eve": (0.8, 0.8)}
    assert said(with_owners(hand_written(), owners))[:4] == [
        "Compared with each owner's own model at home, the merged model is better for 2 of 5 owners, worse for 1 and "
        "not clearly different for 2.",
        "Better, in percentage points: dan (+15.0) and ada (+6.0).",
        "Worse, in percentage points: cyd (-10.0).",
        "Not clearly different, in percentage points: bea (-2.0) and eve (0.0).",
    ]


def test_the_verdict_counts_many_owners_and_names_those_that_gain_or_lose_most() -> None:
    many = {f"owner-{number}": (0.5 + number / 250, 0.5) for number in range(100)}
    first, better, unclear = said(with_owners(hand_written(), many))[:3]
    gaining = sum(0.5 + number / 250 - 0.5 > 0.07 for number in range(100))
    assert first.endswith(f"is better for {gaining} of 100 owners and not clearly different for {100 - gaining}.")
    assert better.startswith("Better, in percentage points: owner-99 (+39.6), owner-98 (+39.2), ")
    assert better.endswith(f" and {gaining - 6} more.")
    assert unclear.startswith("Not clearly different")


def test_the_verdict_on_owners_that_all_gain_or_that_show_nothing() -> None:
    alike = {"ada": (0.9, 0.8), "bea": (0.95, 0.8)}
    assert said(with_owners(hand_written(), alike))[0].endswith("the merged model is better for both owners.")
    report = hand_written()
    report["evaluation"]["by_owner"] = {}
    first, second = said(report)[:2]
    assert first.startswith("On average over 2 owners, the merged model (RegMean) is right on 75.0 %")
    assert second == ("ada and bea show their metrics only in the mean, so nobody else knows what each gains or loses.")


def test_an_owner_that_dropped_out_of_the_test_metrics_is_not_counted_in_their_mean() -> None:
    report = with_owners(hand_written(), {"ada": (0.9, 0.8), "bea": (0.95, 0.8)})
    report["owners"].append("cyd")
    sentences = said(report)
    assert sentences[0].endswith("the merged model is better for both owners.")
    assert any(sentence.startswith("On average over 2 owners") for sentence in sentences)
    assert "cyd" not in " ".join(sentences)
    assert "Mean of 2 owners" in shown(report)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("token-classification", "tags 75.0 % of the test words correctly, and each owner's own model at home 87.5 %"),
        ("token-classification", "look at entity F1 too: 0.500 for the merged model, 0.625 for each"),
        ("causal-lm", "predicts 75.0 % of the test tokens correctly, and each owner's own model at home 87.5 %"),
    ],
)
def test_the_verdict_has_the_words_of_the_task(kind: str, words: str) -> None:
    report = hand_written()
    report["agreement"]["task"]["kind"] = kind
    assert words in " ".join(said(report))


def as_regression(report: dict[str, Any]) -> dict[str, Any]:
    """The same with correlations instead of accuracies; the published model has the sums of one target."""
    evaluation = report["evaluation"]
    evaluation |= {"metric": "mean_squared_error", "choose_by": "mean_squared_error"}
    task = {"problem_type": "regression", "labels": ["stars"], "target_range": [1.0, 5.0]}
    report["agreement"]["task"] |= task
    judged = [*evaluation["mean"].values(), *evaluation["by_owner"]["ada"].values(), *evaluation["sweep"]["regmean"]]
    for each in judged:
        each |= {"pearson_r": each["accuracy"], "accuracy": None}
        each |= {"pooled_accuracy": None} if "pooled_accuracy" in each else {}
    evaluation["mean"]["regmean"]["sums"] = [[400.0, 400.0, 280.0, 280.0, 40.0]]
    return report


def test_the_report_of_a_regression_speaks_of_correlations_and_errors() -> None:
    report = as_regression(hand_written())
    sentences = " ".join(said(report))
    assert (
        "correlates with the targets at 0.750 (Pearson's r), and each owner's own model at home at 0.875" in sentences
    )
    assert "%" not in sentences
    assert "On the test rows of all owners, it is" in sentences
    page = shown(report)
    for words in (
        "Targets lie between 1 and 5",
        "mean squared error is 0.500. Lower: ",
        "predicting numbers from texts",
    ):
        assert words in page
    assert "0.750" in page
    assert "percentage points" not in page
    assert "stars" in page
    assert "0.8" in page  # 40 / 800 rows, times the squared range


@pytest.mark.parametrize("changes", [{"accuracy": 0.5}, {"pearson_r": None}, {"accuracy": 0.5, "pearson_r": None}])
def test_a_regression_has_no_accuracy_and_every_other_task_no_correlation(changes: dict[str, float | None]) -> None:
    report = as_regression(hand_written())
    report["evaluation"]["mean"]["base"] |= changes
    with pytest.raises(ValidationError, match="a regression has pearson_r, and every other task has accuracy"):
        as_report(report)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sums": [[1.0, 1.0, 1.0]]}, "sums that are not those of the agreed labels"),  # two labels are agreed
        ({"sums": [[1.0, 1.0], [1.0, 1.0]]}, "sums that are not those of the agreed labels"),
    ],
)
def test_sums_that_a_reader_would_stumble_over_are_refused(changes: dict[str, Any], says: str) -> None:
    report = hand_written()
    report["agreement"]["task"]["problem_type"] = "multi_label_classification"
    report["evaluation"]["mean"]["base"] |= changes
    with pytest.raises(ValidationError, match=says):
        as_report(report)
    report["agreement"]["task"]["problem_type"] = "single_label_classification"
    with pytest.raises(ValidationError, match=says):
        as_report(report)


def test_the_report_of_several_labels_has_counts_by_label_and_micro_f1() -> None:
    report = hand_written()
    report["agreement"]["task"]["problem_type"] = "multi_label_classification"
    for scores in report["evaluation"]["mean"].values():
        scores["sums"] = [[30.0, 40.0, 50.0], [0.0, 0.0, 0.0]]
    page = shown(report)
    assert "names exactly the right labels of 75.0" in " ".join(said(report))
    assert f"RegMean {60 / 90:.3f}" in page
    assert "Rows that have it" in page


def test_the_report_says_what_share_of_all_owners_texts_was_cut() -> None:
    report = hand_written()
    assert "longer than task.max_tokens" not in shown(report)
    report["evaluation"]["cut"] = [50, 2000]
    assert "2.5 % of the owners' test texts are longer than task.max_tokens, and were cut." in shown(report)
    report["evaluation"]["cut"] = [1, 0]
    with pytest.raises(ValidationError, match="more texts are cut than there are"):
        as_report(report)


def test_the_report_of_a_language_model_speaks_of_no_labels() -> None:
    report = hand_written()
    report["agreement"]["task"] |= {"kind": "causal-lm", "labels": []}
    printed = Console(file=io.StringIO(), width=200)
    print_report(printed, as_report(report), Path("out"))
    for text in (shown(report), printed.file.getvalue()):  # type: ignore[attr-defined]
        assert "label" not in text.lower()


def test_the_published_row_is_marked_without_colour() -> None:
    printed = Console(file=io.StringIO(), width=200)
    print_report(printed, as_report(hand_written()), Path("out"))
    lines = printed.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[:2] for line in lines if "←" in line] == [["RegMean", "←"], ["←", "the"]]


def test_the_verdict_does_not_call_better_what_chance_explains() -> None:
    report = hand_written()
    mean = report["evaluation"]["mean"]
    mean["average"]["accuracy"], mean["fisher"]["accuracy"] = 0.71, 0.79
    sentences = " ".join(said(report))
    assert "not clearly different from Fisher averaging (79.0 %) and the plain average (71.0 %)" in sentences
    mean["average"]["accuracy"] = 0.70
    assert "better than the plain average (70.0 %)" in " ".join(said(report))


def test_legends_and_lists_are_in_the_order_of_the_roster_whoever_answered_first() -> None:
    names = ["zoe", "mia", "ada", "lea", "eve"]
    report = of_many(names)
    report["steps"].append(report["steps"][0] | {"phase": "test metrics"})
    page = page_of(as_report(report))
    assert page.count('<span class="name">zoe</span>, <span class="name">mia</span>') > 2
    plot = page[page.index(">From the owners<") : page.index("Payload, by owner.")]
    legend = re.findall(r">(zoe|mia|ada|lea|eve)</text>", plot)
    assert legend == ["zoe", "lea", "mia", "eve", "ada"]  # a legend is filled by column, and so is read by row


def test_a_cost_that_one_phase_has_is_a_sentence_and_not_a_plot_of_one_bar() -> None:
    report = hand_written()
    text = shown(report)
    assert "Nearly all of it, 20.0 of 20.0 MB, was “contributions”." in text
    assert "Payload, by owner." not in text
    report["steps"].append(report["steps"][0] | {"phase": "test metrics"})
    assert "Nearly all of it" not in shown(report)


def test_no_column_of_the_layers_is_explained_that_is_not_there() -> None:
    report = hand_written()
    text = shown(report)
    assert "Condition Largest eigenvalue by smallest." in text
    assert "Condition, change from base and distance from average are coloured by order of magnitude" in text
    report["layers"] = []
    for change in report["changes"]:
        change["from_average"] = None
    text = shown(report)
    assert "Change from base |merged \u2212 base| / |base|" in text
    for absent in ("Condition", "condition", "Effective rank", "from average", "Token rows", "Solve"):
        assert absent not in text


def test_a_language_model_s_sweep_shows_what_decided_and_not_two_scales_in_one_plot() -> None:
    report = hand_written()
    report["evaluation"] |= {"metric": "log_likelihood", "choose_by": "log_likelihood"}
    page = page_of(as_report(report))
    plots = page[page.index("choice-heading") : page.index("revealed-heading")]
    assert re.findall(r">(accuracy|log likelihood)</text>", plots) == ["log likelihood"]


@pytest.mark.parametrize(
    ("values", "is_logarithmic", "expected"),
    [
        ([1.0, 4.0, 7.0], False, [0, 3, 6]),
        ([1.0, 10.0, 100.0], True, [0, 3, 6]),
        ([0.8, 1.5, 6.7], True, [0, 2, 6]),
        ([None, 1.0, 7.0], False, [0, 0, 6]),
        ([0.0, 0.01, 1.0], True, [0, 0, 6]),
        ([3.0, 3.0], True, [0, 0]),
        ([0.0, 0.0], True, [0, 0]),
        ([], False, []),
    ],
)
def test_tints_go_from_the_smallest_to_the_largest_of_a_column(
    values: list[float | None], is_logarithmic: bool, expected: list[int]
) -> None:
    assert tints(values, is_logarithmic) == expected


@given(st.lists(st.floats(0, 1e300) | st.none(), max_size=20), st.booleans())
def test_a_larger_number_is_never_paler(values: list[float | None], is_logarithmic: bool) -> None:
    steps = tints(values, is_logarithmic)
    assert all(0 <= step <= STEPS for step in steps)
    known = [(value, step) for value, step in zip(values, steps, strict=True) if value is not None]
    assert [step for _, step in sorted(known)] == sorted(step for _, step in known)


@pytest.mark.parametrize("owners", [2, 30])
def test_many_owners_and_few_fit_on_the_page(owners: int) -> None:
    report = hand_written()
    names = [f"owner-{number}" for number in range(owners)]
    report["owners"] = names
    report["steps"][0]["by_owner"] = dict.fromkeys(names, report["steps"][0]["by_owner"]["ada"])
    assert ("the others" in shown(report)) == (owners > 7)


def test_a_report_without_grams_sweeps_or_single_metrics_has_a_page() -> None:
    report = hand_written()
    report["layers"], report["low_rank"], report["examples"] = [], None, None
    report["evaluation"]["sweep"], report["evaluation"]["by_owner"] = {}, {}
    report["chosen"]["regmean"] = {"candidate": "regmean", "hyperparameter": None}
    for change in report["changes"]:
        change["from_average"] = None
    text = shown(report)
    assert "had only one candidate" in text
    assert "Condition" not in text


def test_the_page_lies_beside_the_report(tmp_path: Path) -> None:
    report = as_report(hand_written())
    save_report(report, tmp_path)
    assert render_report(tmp_path).read_text() == page_of(report)


def test_a_missing_or_foreign_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"report_version": 99}))
    with pytest.raises(SettingsError, match="report_version is 99, this release reads 5"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (
            b'{"step": "roll call"}\n{"step": "sum of contributions", "done": []}\n{"message": "x"}\n',
            "sum of contributions",
        ),
        (b'{"step": "roll call"}\n{"step": "sum of con', "roll call"),
        (b'{"step": 5}\n[1]\n\xff\n', None),
        (b"", None),
    ],
)
def test_the_report_of_a_run_that_failed_half_way_says_how_far_it_came(
    content: bytes, step: str | None, tmp_path: Path
) -> None:
    (tmp_path / PROGRESS).write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_report(tmp_path)
    assert (f"the last run here ended in the step '{step}'" in caught.value.message) == (step is not None)
    assert caught.value.hint == ("run the merge again" if step else "name the output folder of a run that succeeded")


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report = as_report(hand_written())
    save_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert json.loads(as_json(report)) == hand_written()


def set_at(content: Any, place: tuple[str | int, ...], value: Any) -> None:
    for step in place[:-1]:
        content = content[step]
    content[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("seconds",), "12", "seconds: must be a number"),
        (("seconds",), float("nan"), "seconds: must be finite"),
        (("seconds",), float("inf"), "seconds: must be finite"),
        (("owners",), [], "owners: has too few entries, the minimum is 1"),
        (("evaluation", "mean", "base", "predictions"), 0, "evaluation.mean.base.predictions: must be at least 1"),
        (("evaluation", "mean", "base", "accuracy"), 1.5, "evaluation.mean.base.accuracy: must be at most 1"),
        (
            ("rounds", 0, "kind"),
            "theft",
            "rounds.0.kind: must be 'scales', 'contribution', 'step', 'check' or 'metrics'",
        ),
        (("sent", 0, "kind"), "<b>\n", "sent.0: must have 'kind' = one of 'candidate'"),
        (("<b>\n\u202e" + 1000 * "x",), 1, r"<b>\n\u202exxx"),
        (("layers", 0, "rows"), 1, "layers.0.rows: is an unknown key"),
        (("evaluation", "mean", "stock"), {}, "evaluation.mean.stock.accuracy: is missing"),
        (("method",), "stock", "method names a method that `methods` lacks"),
        (("agreement", "compare_with"), ["stock"], "agreement.compare_with names a method that `methods` lacks"),
        (("sent", 0, "method"), "stock", "sent names a method that `methods` lacks"),
        (("methods", "base"), hand_written()["methods"]["regmean"], "methods: a method has the name of a reference"),
        (("chosen",), {}, "chosen lacks a method that was published or swept"),
        (("chosen", "regmean", "candidate"), "x", "chosen names a candidate that its sweep lacks"),
        (("evaluation", "by_owner", "bea"), {}, "evaluation lacks the published method or own_at_home"),
    ],
)
def test_a_malformed_report_is_refused_in_one_line_with_a_hint(
    place: tuple[str | int, ...], value: Any, says: str, tmp_path: Path
) -> None:
    content = hand_written()
    set_at(content, place, value)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError) as caught:
        read_report(tmp_path)
    assert says in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < len(str(tmp_path)) + 400
    assert "get it again" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", 100_000 * b"[", 100_000 * b'{"title":'])
def test_a_file_that_holds_no_report_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_report(tmp_path)
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_a_report_that_is_too_large_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(MAX_REPORT_BYTES + 1)
    with pytest.raises(SettingsError, match="more than 64000000 bytes"):
        read_report(tmp_path)


def test_a_method_that_no_table_knows_is_on_the_page() -> None:
    report = hand_written()
    report["methods"]["model_stock"] = report["methods"]["average"] | {"title": "Model Stock", "phrase": "Model Stock"}
    report["chosen"]["model_stock"] = {"candidate": "model_stock", "hyperparameter": None}
    report["agreement"]["compare_with"].append("model_stock")
    for models in (report["evaluation"]["mean"], *report["evaluation"]["by_owner"].values()):
        models["model_stock"] = models["average"]
    text = shown(report)
    assert "better than the plain average (62.5 %), Model Stock (62.5 %) and the base model" in text
    assert "compared with average, Fisher and Model Stock" in text


def test_the_schema_in_the_documents_is_the_one_that_is_read() -> None:
    text = SCHEMA.read_text()
    assert text == schema_text(), "run: python -m server.report.report > docs/report.schema.json"
    assert "version 5" in json.loads(text)["title"]


def test_every_field_of_the_schema_is_described() -> None:
    tables = json.loads(schema_text())
    for name, table in {"Report": tables, **tables["$defs"]}.items():
        for field, rules in table.get("properties", {}).items():
            part = tables["$defs"].get(rules.get("$ref", "").rpartition("/")[2], {})
            assert rules.get("description") or part.get("description"), f"{name}.{field}"


def test_an_installed_package_has_every_file_that_the_page_is_made_of() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in ("server.report", "common.page", "client.audit"):
        patterns = settings["tool"]["setuptools"]["package-data"][package]
        room = ROOT.joinpath(*package.split("."))
        packed = {path for pattern in patterns for path in room.glob(pattern)}
        needed = {path for path in room.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert needed == packed
