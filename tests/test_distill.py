"""A student that owners teach by predictions: what is summed, what it is trained on, who may take part."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.audit.audit import audit
from client.audit.subjects import own_subject, subject_in
from client.holdings import Holdings
from client.measurement.closeness import closeness
from client.measurement.predictions import as_summed
from client.owner import Owner
from client.personal import personalise
from client.settings import OwnerSettings
from common.agreement import Task, TaskKind, load_agreement
from common.errors import DataError, LocalProtocolError, NumericalError, SettingsError
from common.merge_methods.data_free import DATA_FREE
from common.merge_methods.distill import DISTILL, LEAST_CLOSENESS, DistillTable, predictions_alone
from common.merge_methods.terms import MergeSettings, OwnerTerms, Predictions
from common.models.loading import load_base
from common.pool import pin_pool, read_pool
from common.schedule import schedule_of
from common.settings_file import load_settings
from common.summation.protocol import Total
from deploy.simulation.parties import PARTIES
from server.bounds import check_contributions
from server.merge import run_merge
from server.output_folder import CHECKPOINT
from server.report.report import Report, read_report
from server.student import LATEST, STUDENT, Student
from tests.support.full_disk import file_size_limited
from tests.support.merging import merge_settings, owner_for, plan_for, total_of
from tests.support.parties import OwnersChannel, Parties, parties_of

ROWS, LABELS = 3, 2
TEXTS: TaskKind = "text-classification"
ONE_LABEL = Task(labels=("a", "b", "c", "d", "e"))
SEVERAL_LABELS = Task(problem_type="multi_label_classification", labels=ONE_LABEL.labels)


@pytest.fixture(scope="module")
def report(taught: Path) -> Report:
    return read_report(taught)


# --- as a whole -------------------------------------------------------------------------------------------------------


def test_a_student_of_models_that_share_nothing_is_better_than_each_of_them_on_everybodys_rows(report: Report) -> None:
    mean = report.evaluation.mean
    assert mean["distill"].accuracy > mean["own"].accuracy + 0.02
    assert mean["distill"].accuracy > mean["base"].accuracy + 0.1


def test_references_need_all_models_in_one_place(report: Report) -> None:
    """Among them Synthetic Model Combination."""
    assert {"own", "ensemble", "close_ensemble"} <= report.evaluation.mean.keys()
    assert report.evaluation.mean["close_ensemble"].accuracy > report.evaluation.mean["own"].accuracy


def test_an_owner_with_another_base_is_judged_as_its_own_model_reads(report: Report) -> None:
    """Another vocabulary, and the labels in another order."""
    assert report.evaluation.by_owner["kiosk"]["own_at_home"].accuracy > 0.9


def test_a_command_that_compares_weights_says_that_an_owner_has_a_base_of_its_own(taught: Path) -> None:
    home = taught / PARTIES
    settings = load_settings(home / "kiosk.toml", OwnerSettings)
    kiosk = Holdings(settings, home, load_agreement(home / settings.agreement))
    with pytest.raises(SettingsError, match=r"amalgram personal: kiosk's model has a base of its own"):
        personalise(kiosk, kiosk.load_base())


def test_an_audit_compares_an_owner_s_model_with_its_own_base_and_the_student_with_the_agreed_one(taught: Path) -> None:
    home = taught / PARTIES
    settings = load_settings(home / "kiosk.toml", OwnerSettings)
    kiosk = Holdings(settings, home, load_agreement(home / settings.agreement))
    own = own_subject(kiosk)
    student = subject_in(kiosk, own.origin, taught / "model", base=None)
    found = audit(kiosk, own, student, None, 30)
    assert [each.name for each in found.models] == ["base", "own", "model_base", "model"]
    base, _, agreed_base, model = found.models
    assert agreed_base.digest == kiosk.agreement.base_digest != base.digest
    assert min(model.fit.accuracy_strangers, found.models[1].fit.accuracy_strangers) > 0.8
    assert all(each.lineage is not None for each in (found.models[1], model))


def test_the_report_and_the_card_say_what_was_done(report: Report, taught: Path) -> None:
    assert report.methods["distill"].title == "distillation"
    assert not report.verified
    assert [each.candidate for each in report.evaluation.sweep["distill"]] == ["distill@2", "distill@6"]
    chosen = int(report.chosen["distill"].hyperparameter or 0)
    assert f"distill: trained on 240 public rows, {chosen} times" in report.notes
    assert "distill: hotel, cinema, phones gave weights and predictions" in report.notes
    assert "distill: kiosk gave predictions alone" in report.notes
    assert report.examples is None  # the kiosk's were not summed
    card = (taught / "model" / "README.md").read_text()
    assert "- distill\n" in card


# --- what is summed ---------------------------------------------------------------------------------------------------


def settings_of(table: DistillTable, **changes: object) -> MergeSettings:
    return replace(merge_settings(plan_for(3, [2]), distill=table), **changes)  # type: ignore[arg-type]


def said_by(seed: int, known: tuple[bool, ...] = (True, True), *, is_close: bool = False) -> Predictions:
    random = np.random.default_rng(seed)
    numbers = as_summed(random.standard_normal((ROWS, LABELS)).astype(np.float32), np.array(known), ONE_LABEL)
    close = random.uniform(0, 1, ROWS) if is_close else None
    return Predictions(numbers=numbers, known=np.array(known), closeness=close)


def owners_that(table: DistillTable, said: Mapping[str, Predictions]) -> dict[str, OwnerTerms]:
    plan = plan_for(3, [2])
    return {
        name: replace(owner_for(plan, torch.ones(4, 3, dtype=torch.float64), seed), predictions=each)
        for seed, (name, each) in enumerate(said.items())
    }


def test_the_teacher_is_the_mean_of_all_probabilities() -> None:
    table = DistillTable(pool="pool.jsonl", rows=ROWS, start="base")
    settings, said = settings_of(table), {name: said_by(seed) for seed, name in enumerate(("ada", "bea", "cyd"))}
    total = total_of(["distill"], settings, owners_that(table, said))
    expected = np.mean([each.numbers for each in said.values()], axis=0, dtype=np.float64)
    np.testing.assert_allclose(DISTILL.teacher(settings, total), expected, atol=1e-9)
    check_contributions(total, total.layout, settings)


def test_by_density_a_row_is_taught_by_those_that_it_is_close_to() -> None:
    table = DistillTable(pool="pool.jsonl", rows=ROWS, start="base", weights="density")
    settings = settings_of(table)
    said = {name: said_by(seed, is_close=True) for seed, name in enumerate(("ada", "bea", "cyd"))}
    total = total_of(["distill"], settings, owners_that(table, said))
    close = np.array([np.maximum(each.closeness, LEAST_CLOSENESS) for each in said.values()])  # (owners, rows)
    numbers = np.array([each.numbers for each in said.values()])  # (owners, rows, labels)
    expected = np.einsum("or,orl->rl", close, numbers) / close.sum(axis=0)[:, None]
    np.testing.assert_allclose(DISTILL.teacher(settings, total), expected, atol=1e-6)
    check_contributions(total, total.layout, settings)


@pytest.mark.parametrize("weights", ["alike", "density"])
def test_a_label_is_taught_by_the_models_that_know_it(weights: str) -> None:
    table = DistillTable.model_validate({"pool": "pool.jsonl", "rows": ROWS, "start": "base", "weights": weights})
    known = {"ada": (True, True, False), "bea": (True, True, True), "cyd": (False, True, True)}
    settings = settings_of(table, num_labels=3, unknown_labels={"ada": frozenset({2}), "cyd": frozenset({0})})
    said = {
        name: Predictions(
            numbers=as_summed(
                np.outer(np.ones(ROWS), index * np.arange(3)).astype(np.float32), np.array(each), ONE_LABEL
            ),
            known=np.array(each),
            closeness=np.full(ROWS, index / 3),
        )
        for index, (name, each) in enumerate(known.items(), 1)
    }
    total = total_of(["distill"], settings, owners_that(table, said))
    ada, bea = (said[name].numbers[:, 0] for name in ("ada", "bea"))
    first = (ada + bea) / 2 if weights == "alike" else (ada + 2 * bea) / 3
    np.testing.assert_allclose(DISTILL.teacher(settings, total)[:, 0], first, atol=1e-6)
    check_contributions(total, total.layout, settings)


@given(st.integers(0, 2**32 - 1))
def test_probabilities_are_of_known_labels(seed: int) -> None:
    random, known = np.random.default_rng(seed), np.array([True, False, True, True, False])
    logits = (random.standard_normal((4, 5)) * 20).astype(np.float32)
    for task in (ONE_LABEL, SEVERAL_LABELS):
        powers = np.exp(logits.astype(np.float64)) * known
        whole = powers.sum(axis=1, keepdims=True) if task is ONE_LABEL else 1 + powers
        np.testing.assert_allclose(as_summed(logits, known, task), powers / whole, rtol=1e-4, atol=1e-30)


def test_own_rows_are_close_and_others_are_not() -> None:
    random = np.random.default_rng(0)
    own, far = random.standard_normal((200, 6)), random.standard_normal((50, 6)) + 9
    pool = np.concatenate([random.standard_normal((50, 6)), far])
    found = closeness(pool, own, pool)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.median(found[:50]) > 0.3
    assert found[50:].max() < 1e-3
    turned = np.linalg.qr(random.standard_normal((6, 6)))[0]
    np.testing.assert_allclose(closeness(pool @ turned, own @ turned, pool @ turned), found, atol=1e-6)


def test_the_start_is_the_merge_of_those_that_give_weights_alone() -> None:
    """As if the others were not there, although they are in the same sum."""
    table = DistillTable(pool="pool.jsonl", rows=ROWS, start="data_free")
    settings = settings_of(table, without_weights=frozenset({"dan"}))
    said = {name: said_by(seed) for seed, name in enumerate(("ada", "bea", "cyd", "dan"))}
    owners = owners_that(table, said)
    vector = np.zeros(DISTILL.layout(settings).size)
    for name, owner in owners.items():
        part = np.zeros_like(vector)
        alone = predictions_alone(DISTILL.layout(settings), settings, said[name])
        DISTILL.layout(settings).flatten(alone if name == "dan" else DISTILL.contribution(settings, owner), part)
        vector += part
    total = Total(layout=DISTILL.layout(settings), vector=vector, owners=tuple(owners), roster_size=4)
    check_contributions(total, total.layout, settings)
    givers = total_of(["data_free"], settings, {name: each for name, each in owners.items() if name != "dan"})
    expected = DATA_FREE.solve(settings, givers, 1.0, with_spectra=False)
    for name, tensor in DISTILL.start(settings, total).delta.items():
        torch.testing.assert_close(tensor, expected.delta[name], atol=1e-6, rtol=1e-5)


# --- the pool ---------------------------------------------------------------------------------------------------------


def write_pool(folder: Path, *lines: str) -> tuple[Path, DistillTable]:
    path = folder / "pool.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path, DistillTable(pool="pool.jsonl")


def test_a_pool_is_pinned_and_read(tmp_path: Path) -> None:
    path, table = write_pool(tmp_path, '{"text": "good"}', '{"text": "bad", "label": 3}')
    pinned = pin_pool(path, table, TEXTS)
    assert pinned.rows == 2
    assert read_pool(path, pinned, TEXTS).texts == (("good",), ("bad",))
    assert pin_pool(path, pinned, TEXTS) == pinned


def test_another_pool_is_refused(tmp_path: Path) -> None:
    path, table = write_pool(tmp_path, '{"text": "good"}')
    pinned = pin_pool(path, table, TEXTS)
    write_pool(tmp_path, '{"text": "Good"}')
    with pytest.raises(DataError, match=r"its SHA-256 is .*, the agreement's is .*\nhint: get the file"):
        read_pool(path, pinned, TEXTS)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "good"}', '{"text": " GOOD"}'], "row 2 says the same as row 1"),
        ([], "has no rows"),
        (['{"text": "good"}', '{"text": " "}'], "row 2: 'text' must be a text"),
        (['{"text": ""}'], "row 1: 'text' must be a text"),
        (['{"text": 3}'], "row 1: 'text' must be a text"),
        (['{"text": "\\ud800"}'], "row 1: 'text' must be a text"),
        (["[1]"], "line 1 is list, not a JSON object"),
        (['{"other": "good"}'], "line 1 has no column 'text'"),
        (['{"text": "good"'], "line 1 is not one JSON object"),
        (["[" * 100_000], "line 1 is not one JSON object"),
    ],
)
def test_a_malformed_pool_is_named(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        pin_pool(*write_pool(tmp_path, *lines), TEXTS)


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture
def teaching(teaching_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    with parties_of(teaching_folder, tmp_path / "output") as parties:
        yield parties


def student_in(folder: Path, parties: Parties, **table: object) -> tuple[Student, MergeSettings, Total]:
    """A student, and a total in which the teacher is sure that every text is negative."""
    agreed = DISTILL.of(parties.agreement.tables).model_copy(update={"start": "base", **table})
    agreement = parties.agreement.model_copy(update={"distill": agreed, "method": "distill", "compare_with": ()})
    settings, owners = agreement.merge_settings(parties.plan), agreement.owner_names
    layout = DISTILL.layout(settings)
    vector = np.concatenate([np.tile([4.0, 0.0], agreed.rows or 0), np.full(2, 4.0)])
    total = Total(layout=layout, vector=vector, owners=owners, roster_size=len(owners))
    pool = parties.folder.parent.parent / "pool"
    pool = Owner(parties.files["kiosk"]).settings.pool or pool
    return Student(agreement=agreement, base_folder=parties.base, pool=pool, folder=folder), settings, total


def test_a_student_learns_what_its_teacher_says(teaching: Parties, tmp_path: Path) -> None:
    student, settings, total = student_in(tmp_path / "student", teaching)
    changed = student.after(2, settings, total).delta
    base = load_base(teaching.base, teaching.agreement.task, 0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.add_(changed[name])
    rows = Owner(teaching.files["hotel"]).workbench.data.test()
    logits = Owner(teaching.files["hotel"]).workbench.own_logits(base, rows)
    assert (logits.argmax(axis=1) == 0).all()


def test_a_student_that_is_killed_between_two_epochs_ends_as_if_nothing_had_been(
    teaching: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, settings, total = student_in(tmp_path / "undisturbed", teaching, keep="more confident")
    expected = undisturbed.after(2, settings, total).delta
    killed, *_ = student_in(tmp_path / "killed", teaching, keep="more confident")
    order = Student._order

    def die_in_the_second(self: Student, epoch: int, lengths: np.ndarray) -> Iterator[np.ndarray]:
        if epoch == 1:
            raise KeyboardInterrupt
        return order(self, epoch, lengths)

    monkeypatch.setattr(Student, "_order", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        killed.after(2, settings, total)
    monkeypatch.setattr(Student, "_order", order)
    again, *_ = student_in(tmp_path / "killed", teaching, keep="more confident")
    for name, tensor in again.after(2, settings, total).delta.items():
        assert torch.equal(tensor, expected[name])


def test_a_coordinator_that_is_killed_while_it_trains_resumes_with_the_last_epoch(
    teaching: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    (teaching.output / ".amalgram").touch()
    order, trained = Student._order, list[int]()

    def die_once_in_the_second(self: Student, epoch: int, lengths: np.ndarray) -> Iterator[np.ndarray]:
        trained.append(epoch)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return order(self, epoch, lengths)

    monkeypatch.setattr(Student, "_order", die_once_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_merge(teaching.coordinator, OwnersChannel(teaching.files))
    assert (teaching.output / CHECKPOINT / STUDENT / LATEST).stat().st_mode & 0o077 == 0
    run_merge(teaching.coordinator, OwnersChannel(teaching.files))
    assert trained == [0, 1, 1, 2, 3, 4, 5]
    assert read_report(teaching.output).receipts == teaching.agreement.owner_names
    assert not (teaching.output / CHECKPOINT).exists()


def test_a_full_disk_is_one_line_and_the_student_ends_as_if_nothing_had_been(teaching: Parties, tmp_path: Path) -> None:
    student, settings, total = student_in(tmp_path / "student", teaching, epochs=(1,))
    with file_size_limited(1_000), pytest.raises(DataError, match="student: the student cannot be written here"):
        student.after(1, settings, total)
    undisturbed, *_ = student_in(tmp_path / "undisturbed", teaching, epochs=(1,))
    expected = undisturbed.after(1, settings, total).delta
    for name, tensor in student.after(1, settings, total).delta.items():
        assert torch.equal(tensor, expected[name])


def test_an_epoch_shows_every_row_once_beside_others_of_about_its_length(teaching: Parties, tmp_path: Path) -> None:
    student, *_ = student_in(tmp_path / "student", teaching, batch_size=8)
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    one, other = (list(student._order(epoch, lengths)) for epoch in (0, 1))
    assert sorted(np.concatenate(one)) == list(range(100))
    assert np.mean([np.ptp(lengths[rows]) for rows in one]) < 10
    assert [list(rows) for rows in one] != [list(rows) for rows in other]


@pytest.mark.parametrize("content", [None, [1], {"epoch": 1, "student": {}, "optimizer": {}}])
def test_a_damaged_epoch_is_named(teaching: Parties, tmp_path: Path, content: object) -> None:
    student, settings, total = student_in(tmp_path / "student", teaching)
    (tmp_path / "student").mkdir()
    path = tmp_path / "student" / LATEST
    if content is None:
        path.write_bytes(b"nothing")
    else:
        torch.save(content, path)
    with pytest.raises(SettingsError, match=r"latest\.pt: is damaged .*\nhint: remove the folder"):
        student.after(2, settings, total)


def test_only_agreed_epochs_are_given(teaching: Parties, tmp_path: Path) -> None:
    student, settings, total = student_in(tmp_path / "student", teaching)
    with pytest.raises(LocalProtocolError, match="7 epochs are not among"):
        student.after(7, settings, total)


def test_a_total_that_no_models_can_give_is_refused() -> None:
    table = DistillTable(pool="pool.jsonl", rows=ROWS, start="base")
    settings, said = settings_of(table), {name: said_by(seed) for seed, name in enumerate(("ada", "bea", "cyd"))}
    honest = total_of(["distill"], settings, owners_that(table, said))
    for index, value in ((0, 3.1), (0, -0.1), (-1, 2.0), (-2, 3.1)):
        vector = honest.vector.copy()
        vector[index] = value
        with pytest.raises(NumericalError, match="add up to what no models with the agreed labels"):
            check_contributions(replace(honest, vector=vector), honest.layout, settings)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_predictions_leave_with_the_contributions_in_one_sum_over_the_same_owners(teaching: Parties) -> None:
    schedule = schedule_of(teaching.agreement, teaching.plan)
    assert [(each.kind, each.split) for each in schedule.rounds] == [
        ("contribution", None),
        ("metrics", "validation"),
        ("metrics", "test"),
    ]
    sent = {content.kind: content.numbers for content in schedule.find("contribution").contents("your")}
    assert (sent["predictions"], sent["coverage"]) == (480, 2)
    assert [delivery.names for delivery in schedule.deliveries("candidate", method="distill", split="validation")] == [
        ("distill@2",),
        ("distill@6",),
    ]
    assert not any(each.claims for each in schedule.rounds)
