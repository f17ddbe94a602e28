"""The rounds of an agreement: known answers, and what holds for every agreement."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.agreement import Agreement, AgreementDraft, OwnerEntry, Summation
from common.agreement.tables import Verification
from common.errors import LocalProtocolError, RemoteProtocolError, SettingsError
from common.merge_methods import METHODS, ORDERED
from common.merge_methods.data_free import DataFreeTable
from common.merge_methods.equations import MeanEquation, StackedMeans
from common.merge_methods.method import MultiRoundMethod
from common.merge_methods.normal_equations import SystemEquation
from common.merge_methods.refit import RefitTable
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.search import SearchTable
from common.merge_methods.task_arithmetic import TaskArithmeticTable
from common.metrics import BASE, OWN_AT_HOME
from common.models.plan import MergePlan
from common.schedule import Delivery, Event, Round, Schedule, schedule_of
from common.settings_file import load_settings
from common.verification import Claim, Shortener
from tests.support.scripted_owners import DELIVERY, ROUND, TEST_ROUND

UNSWEPT = RegMeanTable(alphas=(0.9,))


def described(event: Event) -> tuple[object, ...]:
    """A round as (kind, method, step, split, models, title); a delivery as (kind, method, step, split, names)."""
    if isinstance(event, Round):
        step = event.step.number if event.step is not None else None
        return ("round", event.kind, event.method, step, event.split, event.models, event.title)
    return ("delivery", event.kind, event.method, event.step, event.split, event.names)


def contributions() -> tuple[object, ...]:
    return ("round", "contribution", None, None, None, (), "contributions")


def merged(method: str, step: int) -> tuple[object, ...]:
    return ("delivery", "merged_step", method, step, None, ("",))


def step(method: str, number: int, title: str) -> tuple[object, ...]:
    return ("round", "step", method, number, None, (), title)


def candidate(split: str, method: str, *names: str) -> tuple[object, ...]:
    return ("delivery", "candidate", method, None, split, names)


def metrics(split: str, *models: str) -> tuple[object, ...]:
    return ("round", "metrics", None, None, split, models, f"{split} metrics")


# What is sent and summed before anything is measured on a model.
CHECK = (
    ("delivery", "correction", None, None, None, ("",)),
    ("round", "check", None, None, None, (), "check shares"),
)


def events_of(agreement: Agreement, plan: MergePlan, **changes: object) -> list[tuple[object, ...]]:
    return [described(event) for event in schedule_of(agreement.model_copy(update=changes), plan).events]


# --- known answers ----------------------------------------------------------------------------------------------------

ALPHAS = tuple(f"regmean@{alpha}" for alpha in ("0.1", "0.5", "0.9", "0.95", "0.99"))
SCALES = tuple(f"task_arithmetic@{scale}" for scale in ("0.3", "0.5", "1.0"))


def test_the_example_s_schedule(agreement: Agreement, plan: MergePlan, reviews_folder: Path) -> None:
    draft = load_settings(reviews_folder / "agreement.toml", AgreementDraft)
    methods = {"method": draft.method, "compare_with": draft.compare_with, **draft.tables}
    assert events_of(agreement, plan, **methods) == [
        contributions(),
        *(candidate("validation", "regmean", name) for name in ALPHAS),
        *(candidate("validation", "task_arithmetic", name) for name in SCALES),
        candidate("test", "average", "average"),
        candidate("test", "fisher", "fisher"),
        *CHECK,
        metrics("validation", *ALPHAS, *SCALES),
        candidate("test", "regmean", *ALPHAS),
        candidate("test", "task_arithmetic", *SCALES),
        metrics("test", BASE, OWN_AT_HOME, "regmean", "average", "task_arithmetic", "fisher"),
    ]


def test_the_schedule_in_32_bits(agreement: Agreement, plan: MergePlan) -> None:
    changes = {"compare_with": ("average",), "regmean": UNSWEPT, "summation": Summation(ring_bits=32)}
    assert events_of(agreement, plan, **changes) == [
        ("round", "scales", None, None, None, (), "scales"),
        ("delivery", "scales", None, None, None, ("",)),
        contributions(),
        candidate("test", "regmean", "regmean"),
        candidate("test", "average", "average"),
        *CHECK,
        metrics("test", BASE, OWN_AT_HOME, "regmean", "average"),
    ]


def test_the_schedule_of_refit_with_two_balances(agreement: Agreement, plan: MergePlan) -> None:
    refit = RefitTable(balances=(0.0, 0.5))
    swept = ("refit@0.0", "refit@0.5")
    assert events_of(agreement, plan, method="refit", compare_with=(), refit=refit) == [
        contributions(),
        merged("refit", 0),
        *CHECK,
        step("refit", 1, "refit step 1"),
        *(candidate("validation", "refit", name) for name in swept),
        *CHECK,
        metrics("validation", *swept),
        candidate("test", "refit", *swept),
        metrics("test", BASE, OWN_AT_HOME, "refit"),
    ]


def test_the_schedule_of_regmean_plus_plus_on_two_blocks(agreement: Agreement, plan: MergePlan) -> None:
    """Two blocks, then the pooler and the classifier, each a step of its own."""
    name = "regmean_plus_plus"
    assert events_of(agreement, plan, method=name, compare_with=()) == [
        contributions(),
        merged(name, 0),
        *CHECK,
        step(name, 1, "RegMean++ step 1"),
        merged(name, 1),
        *CHECK,
        step(name, 2, "RegMean++ step 2"),
        merged(name, 2),
        *CHECK,
        step(name, 3, "RegMean++ step 3"),
        merged(name, 3),
        *CHECK,
        step(name, 4, "RegMean++ step 4"),
        candidate("test", name, name),
        *CHECK,
        metrics("test", BASE, OWN_AT_HOME, name),
    ]


CHECKED = ("sum of check shares", "verification")


def test_without_verification_nothing_is_checked(agreement: Agreement, plan: MergePlan) -> None:
    changes = {"compare_with": ("average",), "regmean": UNSWEPT, "verification": Verification(required=False)}
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    assert [each.kind for each in schedule.events] == ["contribution", "candidate", "candidate", "metrics"]
    assert {each.learned_by for each in schedule.rounds} == {("coordinator",)}


def test_people_read_what_a_round_is_called(agreement: Agreement, plan: MergePlan) -> None:
    changes = {"method": "regmean_plus_plus", "compare_with": ("refit",), "regmean": UNSWEPT}
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    assert [(each.name, each.phase) for each in schedule.rounds] == [
        ("sum of contributions", "sum of contributions"),
        *(
            each
            for number in (1, 2, 3, 4)
            for each in (CHECKED, (f"sum of RegMean++ step {number}", "rounds of RegMean++"))
        ),
        CHECKED,
        ("sum of refit step 1", "rounds of refit"),
        CHECKED,
        ("sum of test metrics", "sum of test metrics"),
    ]


# --- what holds for every agreement -----------------------------------------------------------------------------------


@st.composite
def changes_to_an_agreement(draw: st.DrawFn) -> dict[str, object]:
    """Methods, sweeps and a ring that an agreement may have."""
    ring_bits = draw(st.sampled_from([32, 64]))
    verifiable = [method for method in ORDERED if method.trust == "nobody"]  # the others: test_distill.py
    allowed = [method.name for method in verifiable if ring_bits == 64 or method.fits_32_bits]
    methods = draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=len(allowed), unique=True))
    if methods == ["search"]:
        methods.append("average")
    basis = tuple(name for name in methods if name != "search")[:3]
    sweep = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3, unique=True).map(tuple)
    return {
        "method": methods[0],
        "compare_with": tuple(methods[1:]),
        "weighting": "owners" if "model_stock" in methods else "rows",
        "summation": Summation(ring_bits=ring_bits),  # type: ignore[arg-type]
        "regmean": RegMeanTable(alphas=draw(sweep)),
        "data_free": DataFreeTable(alphas=draw(sweep)),
        "task_arithmetic": TaskArithmeticTable(scales=draw(sweep)),
        "search": SearchTable(basis=basis, candidates=draw(st.integers(2, 14))) if basis else SearchTable(),
        "refit": RefitTable(balances=draw(sweep), targets=draw(st.sampled_from(["labels", "scores"]))),
    }


@given(changes=changes_to_an_agreement())
def test_every_event_is_known_by_its_position(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    assert [event.position for event in schedule.events] == list(range(len(schedule.events)))
    for event in schedule.events:
        if isinstance(event, Round):
            assert schedule.round_at(event.position) is event
            with pytest.raises(RemoteProtocolError, match=f"position {event.position}, which is for"):
                schedule.delivery_at(event.position, "candidate")
        else:
            assert schedule.delivery_at(event.position, event.kind) is event
            with pytest.raises(RemoteProtocolError, match=f"position {event.position}, where it sends"):
                schedule.round_at(event.position)
    end = len(schedule.events)
    for look_up in (schedule.round_at, lambda position: schedule.delivery_at(position, "candidate")):
        with pytest.raises(RemoteProtocolError, match=f"event {end} of a schedule of {end}"):
            look_up(end)


@given(changes=changes_to_an_agreement())
def test_candidates_are_sent_before_the_round_that_judges_them(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    agreement = agreement.model_copy(update=changes)
    schedule = schedule_of(agreement, plan)
    judging = [each for each in schedule.rounds if each.kind == "metrics"]
    for each in judging:
        assert each.split is not None
        for model in set(each.models) - {BASE, OWN_AT_HOME}:
            assert schedule.delivery_of(model, each.split).position < each.position
    named = {model for each in judging if each.split == "validation" for model in each.models}
    candidates = {name: list(agreement.agreed(METHODS[name])) for name in agreement.methods}
    assert named == {each for names in candidates.values() if len(names) > 1 for each in names}
    assert schedule.events[-1] == judging[-1]
    assert judging[-1].models == (BASE, OWN_AT_HOME, *agreement.methods)


@given(changes=changes_to_an_agreement())
def test_what_a_step_is_measured_on_was_sent_before_it(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    agreement = agreement.model_copy(update=changes)
    schedule, settings = schedule_of(agreement, plan), agreement.merge_settings(plan)
    contribution = schedule.find("contribution")
    for name in agreement.methods:
        method, rounds = METHODS[name], schedule.steps(name)
        sent = schedule.deliveries("merged_step", method=name)
        if not isinstance(method, MultiRoundMethod):
            assert rounds == sent == ()
            continue
        assert tuple(each.step for each in rounds) == method.steps(settings)
        assert [each.step for each in sent] == list(range(len(rounds)))
        assert contribution.position < sent[0].position
        for merged_step, measured in zip(sent, rounds, strict=True):
            checks = [each for each in schedule.rounds if merged_step.position in {c.delivery for c in each.claims}]
            between = schedule.events[merged_step.position + 1 : measured.position]
            assert [each.kind for each in between] == (["correction", "check"] if checks else [])
            assert checks == [each for each in between if each.kind == "check"]
            assert len(checks) == (1 if merged_step.layout.size else 0)
        for measured, next_merged in zip(rounds, sent[1:], strict=False):
            assert measured.position < next_merged.position


@given(changes=changes_to_an_agreement())
def test_no_round_is_on_scales_that_were_not_sent_before(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    agreement = agreement.model_copy(update=changes)
    schedule = schedule_of(agreement, plan)
    first_in_32_bits = next((each.position for each in schedule.rounds if each.layout.ring_bits == 32), None)
    if not agreement.summation.has_scales:
        assert first_in_32_bits is None
        assert not schedule.deliveries("scales")
        with pytest.raises(LocalProtocolError, match="no round of kind scales"):
            schedule.find("scales")
        return
    (scales,) = schedule.deliveries("scales")
    assert schedule.find("scales").position < scales.position < schedule.find("contribution").position
    assert first_in_32_bits == schedule.find("contribution").position


@given(changes=changes_to_an_agreement())
def test_every_number_that_leaves_in_a_round_is_explained(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    for each in schedule_of(agreement.model_copy(update=changes), plan).rounds:
        contents = each.contents("your")
        assert sorted(name for content in contents for name in content.tensors) == sorted(
            entry.name for entry in each.layout.entries
        )
        assert sum(content.numbers for content in contents) == each.layout.size
        assert all(content.meaning and "{" not in content.meaning for content in contents)


# --- the order in which an owner answers ------------------------------------------------------------------------------


SCHEDULE = Schedule((ROUND, DELIVERY, TEST_ROUND))


def follows(schedule: Schedule, position: int, begun: int | None, is_complete: bool) -> bool:
    try:
        schedule.check_follows(position, begun, is_complete=is_complete)
    except RemoteProtocolError:
        return False
    return True


def allowed(schedule: Schedule, begun: int | None, is_complete: bool) -> list[int]:
    return [event.position for event in schedule.events if follows(schedule, event.position, begun, is_complete)]


def test_the_next_event_follows_once_the_last_one_is_complete() -> None:
    assert allowed(SCHEDULE, None, True) == [0]
    assert allowed(SCHEDULE, 0, False) == [0]
    assert allowed(SCHEDULE, 0, True) == [0, 1]
    assert allowed(SCHEDULE, 1, False) == [1]
    assert allowed(SCHEDULE, 1, True) == [1, 2]
    assert allowed(SCHEDULE, 2, True) == [2]


def test_an_owner_that_may_drop_out_may_miss_rounds_but_no_delivery() -> None:
    schedule = replace(SCHEDULE, owners_may_drop_out=True)
    assert allowed(schedule, None, True) == [0, 1]  # it was not there for the contributions
    assert allowed(schedule, 0, False) == [0, 1]  # it dropped out of them
    assert allowed(schedule, 0, True) == [0, 1]
    assert allowed(schedule, 1, False) == [1]
    assert allowed(schedule, 1, True) == [1, 2]
    assert allowed(schedule, 2, False) == [2]


def test_an_owner_that_may_drop_out_misses_no_check(agreement: Agreement, plan: MergePlan) -> None:
    changes = {"compare_with": (), "regmean": UNSWEPT, "min_owners": 2}
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    candidate_, correction, check, test = schedule.events[1:]
    assert allowed(schedule, candidate_.position, True) == [candidate_.position, correction.position]
    assert allowed(schedule, correction.position, False) == [correction.position]
    assert allowed(schedule, correction.position, True) == [correction.position, test.position]  # and check meanwhile
    assert schedule.check_at(check.position) is check
    assert schedule.check_at(test.position) is None
    swept = schedule_of(agreement.model_copy(update={"compare_with": (), "min_owners": 2}), plan)
    validation = swept.find("metrics", split="validation")
    assert allowed(swept, validation.position - 2, True) == [validation.position - 2, validation.position]


@given(changes=changes_to_an_agreement())
def test_every_model_is_verified_before_anything_is_measured_on_it(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    agreement = agreement.model_copy(update=changes)
    schedule, proved = schedule_of(agreement, plan), dict[int, str]()
    for event in schedule.events:
        if isinstance(event, Round) and event.kind in ("step", "metrics"):
            for sent in schedule.of_kind("merged_step", "candidate"):
                if sent.position < event.position and sent.layout.size:
                    validated = sent.split == "test" and len(agreement.agreed(METHODS[sent.method or ""])) > 1
                    assert sent.position in proved or validated  # bit-identical to one that was proved
        for claim in event.claims if isinstance(event, Round) else ():
            proved[claim.delivery] = event.name
            assert schedule.events[claim.source].kind in ("contribution", "step")
            assert claim.source < claim.delivery < event.position


def test_what_every_owner_is_to_open_must_fit_in_one_message(
    agreement: Agreement, plan: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not swept has a check of its own if one for all would not."""
    swept = agreement.model_copy(update={"regmean": RegMeanTable(alphas=tuple(n / 20 for n in range(20)))})

    def sizes_for(num_owners: int) -> list[int]:
        owners = tuple(OwnerEntry(name=f"o{number}") for number in range(num_owners))
        schedule = schedule_of(swept.model_copy(update={"owners": owners}), plan)
        return [each.layout.num_bytes for each in schedule.rounds if each.kind == "check"]

    ((size,), most) = sizes_for(3), 40
    monkeypatch.setattr("common.schedule.PART_BYTES", most * size)
    assert sizes_for(most) == [size]
    largest = max(sizes_for(most + 1))
    assert len(sizes_for(most + 1)) == 2
    more = most * size // largest
    assert len(sizes_for(more)) == 2
    with pytest.raises(SettingsError, match=f"each of {more + 1} owners is sent .* MB; one message holds at most"):
        sizes_for(more + 1)


def means_of(claim: Claim) -> set[str]:
    """The parameters whose means a claim's equations are about."""
    vectors = [each for group in claim.equations if isinstance(group, StackedMeans) for each in group.means]
    return {each.parameter for each in (*claim.equations, *vectors) if isinstance(each, MeanEquation)}


def test_a_mean_that_several_models_share_is_proved_of_the_first(agreement: Agreement, plan: MergePlan) -> None:
    """The models of a sweep, and those of other methods; what needs a solver is proved of each."""
    agreement = agreement.model_copy(update={"method": "regmean", "compare_with": ("refit", "average")})
    checks = [each.claims for each in schedule_of(agreement, plan).rounds if each.kind == "check"]
    ((start,), tested) = checks
    assert means_of(start)
    known = {(name, start.delivery) for name in means_of(start)}
    first, *others = (each for each in tested if any(isinstance(one, SystemEquation) for one in each.equations))
    assert set(first.known) == known
    assert means_of(first)  # what only this method averages
    for claim in others:
        assert not means_of(claim)
        assert {name for name, _ in claim.known} == means_of(first) | {name for name, _ in first.known}
        assert len(claim.equations) == len([one for one in first.equations if isinstance(one, SystemEquation)])
    (average,) = (each for each in tested if means_of(each) and each is not first)
    assert set(average.known) == known | {(name, first.delivery) for name in means_of(first)}
    assert means_of(average) == set(plan.changed) - means_of(start) - means_of(first)


def test_a_claim_keeps_its_equations_if_nothing_else_is_to_be_proved() -> None:
    mean = MeanEquation.of("l.weight", (3, 4))
    shortener, claims = Shortener(), [Claim(delivery=n, source=0, equations=(mean,)) for n in (1, 2)]
    first, second = shortener.shorten(claims)
    assert (first.equations, first.known) == ((mean,), ())
    assert (second.equations, second.known) == ((), (("l.weight", 1),))
    shortener.keep(claims[0])
    (again,) = shortener.shorten(claims[1:])
    assert again.equations == (mean,)
    other = Claim(delivery=3, source=2, equations=(mean,))
    assert shortener.shorten([other])[0].known == ()  # of another sum


def test_owners_may_drop_out_only_if_the_agreement_needs_fewer(agreement: Agreement, plan: MergePlan) -> None:
    assert not schedule_of(agreement, plan).owners_may_drop_out
    fewer = agreement.model_copy(update={"min_owners": 2})
    assert schedule_of(fewer, plan).owners_may_drop_out


@given(changes=changes_to_an_agreement())
def test_if_all_owners_are_needed_only_the_begun_event_or_the_next_one_passes(
    agreement: Agreement, plan: MergePlan, changes: dict[str, object]
) -> None:
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    assert allowed(schedule, None, True) == [0]
    last = len(schedule.events) - 1
    for begun in range(last + 1):
        is_checked = begun < last and schedule.check_at(begun + 1) is not None
        following = begun + 2 if is_checked else begun + 1
        assert allowed(schedule, begun, True) == ([begun, following] if begun < last else [begun])
        if schedule.check_at(begun) is None:  # a check is never begun
            assert allowed(schedule, begun, False) == [begun]


def test_a_refusal_names_the_event_that_is_due(agreement: Agreement, plan: MergePlan) -> None:
    changes = {"compare_with": ("average",), "regmean": UNSWEPT}
    schedule = schedule_of(agreement.model_copy(update=changes), plan)
    contribution, first, second, correction, check, test = schedule.events
    assert isinstance(first, Delivery)
    for position, begun, is_complete, says in (
        (test.position, None, True, "went on with sum of test metrics, but sum of contributions is due"),
        (first.position, contribution.position, False, "regmean candidate for test, but sum of contributions is due"),
        (test.position, first.position, True, "sum of test metrics, but average candidate for test is due"),
        (contribution.position, second.position, True, "sum of contributions, but correction is due"),
        (test.position, second.position, True, "sum of test metrics, but correction is due"),
        (check.position, correction.position, True, "sum of check shares, but sum of test metrics is due"),
        (test.position, correction.position, False, "sum of test metrics, but correction is due"),
        (second.position, test.position, True, "average candidate for test, but nothing is due"),
    ):
        with pytest.raises(RemoteProtocolError, match=says):
            schedule.check_follows(position, begun, is_complete=is_complete)
