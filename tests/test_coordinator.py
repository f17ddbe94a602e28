"""The coordinator over a channel that misbehaves: who is lost, when it goes on, when it stops and says so."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.agreement import Agreement
from common.errors import OwnerRefused, RemoteProtocolError, TooFewOwners
from common.messages import (
    CandidatePart,
    CandidateReceived,
    Finish,
    Finished,
    Message,
    OpenSum,
    PartRequest,
    Present,
    Refusal,
    RollCall,
    SumOpened,
    VectorPart,
)
from common.tensor_layout import TensorEntry, TensorLayout
from server.coordinator import Coordinator

LAYOUT = TensorLayout((TensorEntry(name="t", shape=(7,)),))
Fault = Callable[[str, Message, Message], Message | None]


class ScriptedChannel:
    """Nodes 10, 11, ... are honest owners, whose answers a fault may replace."""

    def __init__(self, owners: tuple[str, ...], fault: Fault) -> None:
        self.owners = dict(enumerate(owners, 10))
        self.fault = fault
        self.log: list[tuple[str, str]] = []

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        return list(self.owners)

    def exchange(self, requests: Mapping[int, Message], timeout_seconds: float) -> Iterator[tuple[int, Message | None]]:
        for node, request in requests.items():
            owner = self.owners[node]
            self.log.append((owner, type(request).__name__))
            yield node, self.fault(owner, request, honest_answer(owner, request))


def honest_answer(owner: str, request: Message) -> Message:
    if isinstance(request, RollCall):
        return Present(run=request.run, owner=owner)
    if isinstance(request, OpenSum):
        return SumOpened(session=request.session, owner=owner)
    if isinstance(request, PartRequest):
        payload = np.full(7, float(len(owner)))
        return VectorPart(session=request.session, owner=owner, part=request.part, payload=payload)
    if isinstance(request, CandidatePart):
        return CandidateReceived(run=request.run, owner=owner, model=request.model, part=request.part)
    assert isinstance(request, Finish)
    return Finished(run=request.run, owner=owner)


def coordinator_of(
    agreement: Agreement, fault: Fault, needed: int, owners: tuple[str, ...] = ("ada", "bea", "cyd")
) -> Coordinator:
    agreement = agreement.model_copy(update={"min_owners": needed})
    return Coordinator(channel=ScriptedChannel(owners, fault), agreement=agreement)


def run_all(coordinator: Coordinator) -> np.ndarray:
    coordinator.roll_call()
    total = coordinator.sum("contribution", LAYOUT)
    coordinator.send_candidate("average", "test", LAYOUT, np.zeros(7, dtype=np.float32))
    coordinator.finish()
    return total.vector


def lost_at(kind: type[Message], who: str = "bea") -> Fault:
    return lambda owner, request, reply: None if owner == who and isinstance(request, kind) else reply


def honest(owner: str, request: Message, reply: Message) -> Message:
    return reply


def test_an_honest_run_adds_everybody_up(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, honest, needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert coordinator.lost == {}
    assert [step.name for step in coordinator.steps][:2] == ["roll call", "sum of contribution"]
    assert coordinator.steps[1].bytes_received == 3 * 7 * 8


@pytest.mark.parametrize("kind", [RollCall, OpenSum, PartRequest])
def test_the_sum_goes_on_without_a_lost_owner_while_enough_remain(agreement: Agreement, kind: type[Message]) -> None:
    coordinator = coordinator_of(agreement, lost_at(kind), needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert set(coordinator.lost) == {"bea"}


def test_an_owner_lost_in_its_upload_is_in_no_part_of_the_total(agreement: Agreement, monkeypatch) -> None:
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))

    def fault(owner: str, request: Message, reply: Message) -> Message | None:
        if not isinstance(request, PartRequest):
            return reply
        assert isinstance(reply, VectorPart)
        if owner == "bea" and request.part == 2:
            return None
        size = 3 if request.part < 2 else 1
        return replace(reply, payload=reply.payload[:size])

    coordinator = coordinator_of(agreement, fault, needed=2)
    coordinator.roll_call()
    np.testing.assert_array_equal(coordinator.sum("contribution", LAYOUT).vector, np.full(7, 6.0))


@pytest.mark.parametrize("kind", [RollCall, OpenSum, PartRequest, CandidatePart])
def test_too_few_owners_stop_the_run_and_say_who_was_lost_where(agreement: Agreement, kind: type[Message]) -> None:
    coordinator = coordinator_of(agreement, lost_at(kind), needed=3)
    with pytest.raises(TooFewOwners) as caught:
        run_all(coordinator)
    assert "needs 3" in str(caught.value)
    assert caught.value.exit_code == 4
    assert "bea" in coordinator.lost


def test_an_owner_that_forgets_to_confirm_the_end_spoils_nothing(agreement: Agreement) -> None:
    np.testing.assert_array_equal(run_all(coordinator_of(agreement, lost_at(Finish), needed=3)), np.full(7, 9.0))


@pytest.mark.parametrize("kind", [RollCall, OpenSum, PartRequest])
def test_a_refusal_stops_the_run_with_its_code_when_the_owner_is_needed(
    agreement: Agreement, kind: type[Message]
) -> None:
    def refuse(owner: str, request: Message, reply: Message) -> Message:
        return Refusal(code="data") if owner == "bea" and isinstance(request, kind) else reply

    with pytest.raises(OwnerRefused) as caught:
        run_all(coordinator_of(agreement, refuse, needed=3))
    assert (caught.value.owner, caught.value.code, caught.value.exit_code) == ("bea", "data", 2)
    np.testing.assert_array_equal(run_all(coordinator_of(agreement, refuse, needed=2)), np.full(7, 6.0))


def test_an_owner_that_breaks_the_rules_cannot_stop_the_others(agreement: Agreement) -> None:
    def poison(owner: str, request: Message, reply: Message) -> Message:
        if owner == "bea" and isinstance(reply, VectorPart):
            return replace(reply, payload=np.full(7, np.nan))
        return reply

    coordinator = coordinator_of(agreement, poison, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert coordinator.lost == {"bea": "sum of contribution"}
    with pytest.raises(RemoteProtocolError, match="owner bea sent a number that is not finite"):
        run_all(coordinator_of(agreement, poison, needed=3))


def test_a_refusal_to_finish_spoils_nothing(agreement: Agreement) -> None:
    def refuse(owner: str, request: Message, reply: Message) -> Message:
        return Refusal(code="protocol") if isinstance(request, Finish) else reply

    coordinator = coordinator_of(agreement, refuse, needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert coordinator.lost == {}


def test_a_stranger_and_a_double_are_refused_at_the_roll_call(agreement: Agreement) -> None:
    for owners, says in ((("ada", "bea", "eve"), "not on the roster"), (("ada", "bea", "bea"), "two nodes")):
        with pytest.raises(RemoteProtocolError, match=says):
            coordinator_of(agreement, honest, needed=2, owners=owners).roll_call()


def test_an_answer_of_the_wrong_kind_is_refused(agreement: Agreement) -> None:
    def confuse(owner: str, request: Message, reply: Message) -> Message:
        return Finished(run=request.run, owner=owner) if isinstance(request, CandidatePart) else reply

    with pytest.raises(RemoteProtocolError, match="answered a candidate with Finished"):
        run_all(coordinator_of(agreement, confuse, needed=3))


def test_every_attempt_at_a_sum_is_a_session_of_its_own(agreement: Agreement) -> None:
    sessions = []

    def fault(owner: str, request: Message, reply: Message) -> Message | None:
        if isinstance(request, OpenSum):
            sessions.append(request.session)
        return None if owner == "bea" and isinstance(request, PartRequest) else reply

    run_all(coordinator_of(agreement, fault, needed=2))
    assert len(set(sessions)) == 2


def test_settings_of_the_coordinator_are_checked(tmp_path: Path) -> None:
    from common.errors import SettingsError
    from common.settings_file import load_settings
    from server.settings import CoordinatorSettings

    (tmp_path / "coordinator.toml").write_text('agreement = "agreement.toml"\n')
    with pytest.raises(SettingsError, match=r"coordinator\.toml: output is missing"):
        load_settings(tmp_path / "coordinator.toml", CoordinatorSettings)
