"""Which event of a schedule an owner lets follow the one that was begun last."""

from dataclasses import replace

from common.agreement import Agreement
from common.errors import RemoteProtocolError
from common.models.plan import MergePlan
from common.schedule import Schedule, schedule_of
from tests.support.scripted_owners import DELIVERY, ROUND, TEST_ROUND

SCHEDULE = Schedule((ROUND, DELIVERY, TEST_ROUND))


def follows(schedule: Schedule, position: int, begun: int | None, is_complete: bool) -> bool:
    try:
        schedule.check_follows(position, begun, is_complete=is_complete)
    except RemoteProtocolError:
        return False
    return True


def allowed(schedule: Schedule, begun: int | None, is_complete: bool) -> list[int]:
    return [position for position in range(3) if follows(schedule, position, begun, is_complete)]


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


def test_owners_may_drop_out_only_if_the_agreement_needs_fewer(agreement: Agreement, plan: MergePlan) -> None:
    assert not schedule_of(agreement, plan).owners_may_drop_out
    fewer = agreement.model_copy(update={"min_owners": 2})
    assert schedule_of(fewer, plan).owners_may_drop_out
