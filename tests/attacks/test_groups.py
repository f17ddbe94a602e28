"""Attacks 221 to 224: what the metrics of groups of rows can be made to show of few rows."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.groups import NO_GROUP, group_sums, reported_groups
from client.owner import Owner
from common.agreement import Agreement, AgreementDraft, Evaluation
from common.errors import DataError, FalseTotal, NumericalError, SettingsError
from common.metrics import Score, contribution, metrics_layout, read_total
from common.publication import SignedMean
from common.settings_file import parse_settings, parse_toml
from deploy.commands.agree import consent_text
from deploy.commands.verify import check_folder
from server.merge import run_merge
from server.output_folder import claim_output
from server.report.page import render_report
from server.report.report import read_report
from tests.support.parties import OwnersChannel, Parties, parties_of
from tests.support.rows import SCORES

SITES = ("north", "south")
AGREED = '[evaluation]\ngroups = ["north", "south"]\nleast_group_rows = 5\nchoose_by = "worst_group"\n'


# --- 221, 222: a group, or what is left, of few rows ---


def test_221_a_group_of_few_rows_is_not_reported() -> None:
    found = reported_groups(["north"] * 9 + ["south"] * 30 + ["other"] * 20, SITES, least=10)
    assert (found[:9] == NO_GROUP).all()
    assert np.bincount(found[found >= 0]).tolist() == [0, 30]


def test_222_a_total_less_its_groups_is_not_about_few_rows() -> None:
    """Two rows are in no group: all rows less the groups would be these two, so the smallest group joins them."""
    found = reported_groups(["north"] * 12 + ["south"] * 30 + [""] * 2, SITES, least=10)
    assert np.bincount(found[found >= 0]).tolist() == [0, 30]
    assert (found == NO_GROUP).sum() == 14


names = st.sampled_from(["a", "b", "c", "d", "none of them", ""])


@given(st.lists(names, max_size=60), st.integers(2, 12))
def test_every_group_and_the_rest_have_enough_rows_or_none(values: list[str], least: int) -> None:
    found = reported_groups(values, ("a", "b", "c", "d"), least)
    for number, group in enumerate(("a", "b", "c", "d")):
        rows = found == number
        assert rows.sum() == 0 or rows.sum() >= least
        assert all(value == group for value, is_in in zip(values, rows, strict=True) if is_in)
    rest = int((found == NO_GROUP).sum())
    assert rest == 0 or rest >= least or rest == len(values)


def test_sums_of_groups_are_those_of_counting() -> None:
    right, groups = np.array([True, False, True, True]), np.array([1, 1, NO_GROUP, 1])
    assert group_sums(right, groups, 3).tolist() == [[0, 0, 0], [2, 3, 1], [0, 0, 0]]


# --- 223: totals that no rows can have ---


@pytest.mark.parametrize(
    "groups",
    [
        [(11, 10, 1), (0, 0, 0)],  # more right than there are
        [(5, 10, 1), (30, 70, 1)],  # more rows than the model was judged on
        [(20, 30, 2), (25, 30, 2)],  # more right than it got right
        [(5, 10, 2), (0, 0, 0)],  # an owner with five rows
        [(5, 10, 0), (0, 0, 0)],  # of no owner
        [(0, 40, 2), (0, 0, 0)],  # more wrong than it got wrong
    ],
)
def test_223_groups_that_are_no_parts_of_the_rows(agreement: Agreement, groups: list[tuple[int, int, int]]) -> None:
    agreement = agreement.model_copy(update={"evaluation": Evaluation(groups=SITES, least_group_rows=10)})
    layout, total = metrics_layout(agreement, "validation", ["m"]), 0.0
    for number, (owner, score) in enumerate(SCORES.items()):  # 39 of 74 rows are right
        added = groups if number == 0 else [(0, 0, 0)] * 2
        vector = np.empty(layout.size)
        score = Score(correct=score.correct, rows=score.rows, metric=score.metric, groups=tuple(added))
        layout.flatten(contribution(agreement, owner, "validation", {"m": score}), vector)
        total += vector
    with pytest.raises(FalseTotal, match="m/groups is of no rows"):
        read_total(agreement, "validation", ["m"], np.asarray(total))


def test_223_a_group_that_only_some_candidates_are_judged_on(agreement: Agreement) -> None:
    """Whoever reports ten wrong rows for the candidates that it does not like would choose, and no report fits both."""
    agreement = agreement.model_copy(update={"evaluation": Evaluation(groups=SITES, least_group_rows=10)})
    layout, total = metrics_layout(agreement, "validation", ["liked", "other"]), 0.0
    for number, (owner, score) in enumerate(SCORES.items()):
        groups = {"liked": ((0, 0, 0),) * 2, "other": ((0, 10, 1) if number == 0 else (0, 0, 0), (0, 0, 0))}
        vector = np.empty(layout.size)
        scores = {model: replace(score, groups=sums) for model, sums in groups.items()}
        layout.flatten(contribution(agreement, owner, "validation", scores), vector)
        total += vector
    with pytest.raises(FalseTotal, match="other/groups is of no rows"):
        read_total(agreement, "validation", ["liked", "other"], np.asarray(total))


def test_224_a_candidate_is_judged_by_its_worst_group_as_it_is_signed() -> None:
    signed = SignedMean(
        accuracy=0.9, metric=0.9, pooled_accuracy=0.9, predictions=100, groups=((3, 10, 1), (0, 0, 0), (80, 90, 2)),
        by_owner={},
    )  # fmt: skip
    assert signed.chosen_by("worst_group") == 0.3
    assert signed.chosen_by("accuracy") == 0.9


# --- what cannot be agreed on ---


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('groups = ["north", "south"]', "", "no groups are agreed on"),
        ('"south"]', '"North"]', "is named twice, or differs from 'North' only in case"),
        ('"text-classification"', '"causal-lm"', "a row of causal-lm is not right or wrong"),
        (
            "[regmean]",
            "[privacy]\nepsilon = 8.0\n\n[regmean]",
            "metrics of groups are counts of rows, to which no noise is added",
        ),
    ],
)
def test_what_cannot_be_agreed_on_groups(old: str, new: str, reason: str, trained_folder: Path) -> None:
    text = with_groups((trained_folder / "agreement.toml").read_text()).replace(old, new)
    text = text.replace("[privacy]\nmin_rows_per_dimension = 1.0", "" if "epsilon" in new else "[privacy]")
    text = text.replace("max_tokens = 32", 'max_tokens = 32\nlabel_set = "all"')
    with pytest.raises(SettingsError, match=reason):
        parse_settings(parse_toml(text.encode(), "agreement.toml"), AgreementDraft, "agreement.toml")


# --- a whole merge ---


def with_groups(agreement: str) -> str:
    text = agreement.replace('method = "regmean"', 'method = "data_free"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', "[]")
    text = text.replace('[evaluation]\nchoose_by = "accuracy"', AGREED.rstrip())
    return text + "\n[data_free]\nalphas = [0.0, 0.5, 1.0]\n"


@pytest.fixture
def grouped(trained_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    """The hotel has rows of both sites. The others name no column."""
    folder = tmp_path / "consortium"
    shutil.copytree(trained_folder, folder, ignore=shutil.ignore_patterns("output"))
    path = folder / "agreement.toml"
    path.write_text(with_groups(path.read_text()))
    for split in ("validation", "test"):
        rows = folder / "data" / "hotel" / f"{split}.jsonl"
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        named = [line | {"site": "south" if number % 3 else "north"} for number, line in enumerate(lines)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in named))
    settings = folder / "hotel.toml"
    settings.write_text(settings.read_text().replace("[data]\n", '[data]\ngroup = "site"\n'))
    claim_output(tmp_path / "output")
    with parties_of(folder, tmp_path / "output", verified=True) as parties:
        yield parties


def test_the_report_shows_each_group_and_the_worst_decides(grouped: Parties, tmp_path: Path) -> None:
    consent = " ".join(consent_text(Owner(grouped.files["hotel"])).split())
    assert "IF NO OTHER OWNER HAS ROWS OF A GROUP, ITS TOTAL IS YOURS" in consent
    assert "! IN A GROUP THAT NO OTHER OWNER HAS, EVERYBODY SEES" in consent
    without = " ".join(consent_text(Owner(grouped.files["phones"])).split())
    assert "name no column of groups (data.group), so you add zeros" in without
    assert "! IN A GROUP" not in without
    run_merge(grouped.coordinator, OwnersChannel(grouped.files))
    report = read_report(tmp_path / "output")
    judged = report.evaluation.mean
    assert {model: list(each.groups) for model, each in judged.items()} == {model: list(SITES) for model in judged}
    hotel = Owner(grouped.files["hotel"]).workbench
    own = hotel.score_own("test").groups  # the hotel's alone, so the report's are its own
    shown = judged["own_at_home"].groups
    assert [(each.rows, each.owners) for each in shown.values()] == [(rows, 1) for _, rows, _ in own]
    assert [each.accuracy for each in shown.values()] == [correct / rows for correct, rows, _ in own]
    trials = report.evaluation.sweep["data_free"]
    best = max(each.worst_group or 0.0 for each in trials)
    assert report.chosen["data_free"].candidate == next(each.candidate for each in trials if each.worst_group == best)
    receipts = json.loads((tmp_path / "output" / "model" / "receipts.json").read_text())
    assert receipts["publication"]["test"]["own_at_home"]["groups"] == [[int(n) for n in each] for each in own]
    assert check_folder(tmp_path / "output").is_signed
    for forge in (
        lambda evaluation: evaluation["mean"]["data_free"]["groups"]["south"].update(accuracy=0.125),
        lambda evaluation: evaluation["sweep"]["data_free"][0].update(worst_group=0.125),
    ):
        forged = json.loads((tmp_path / "output" / "report.json").read_text())
        forge(forged["evaluation"])
        shutil.copytree(tmp_path / "output", tmp_path / "forged", dirs_exist_ok=True)
        (tmp_path / "forged" / "report.json").write_text(json.dumps(forged))
        assert not check_folder(tmp_path / "forged").is_signed
    render_report(tmp_path / "output")
    page = (tmp_path / "output" / "report.html").read_text()
    assert "By group" in page
    assert "accuracy in the worst group" in page


def test_a_choice_by_groups_that_nobody_has_is_refused(grouped: Parties) -> None:
    hotel = grouped.files["hotel"]
    hotel.write_text(hotel.read_text().replace('group = "site"\n', ""))
    with pytest.raises(NumericalError, match="no owner has 5 validation rows of any agreed group"):
        run_merge(grouped.coordinator, OwnersChannel(grouped.files))


def test_a_column_that_is_not_there_is_said_before_anything_leaves(grouped: Parties) -> None:
    hotel = grouped.files["hotel"]
    hotel.write_text(hotel.read_text().replace('group = "site"', 'group = "sight"'))
    with pytest.raises(DataError, match="sight"):
        Owner(hotel).check()
