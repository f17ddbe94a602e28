"""The coordinator over a channel that misbehaves: who drops out, when it continues, when it stops and says so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.agreement import Agreement
from common.certificates import body_of, check_burned, sign_burned
from common.domain_separation import Domain
from common.errors import ConsentError, OwnerRefused, RemoteProtocolError, TooFewOwners
from common.messages import (
    MAX_ROUND,
    Acknowledgements,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    Finish,
    Finished,
    KeyBook,
    KeyShares,
    MaskedPart,
    Message,
    OpenSum,
    PartRequest,
    Present,
    Receipts,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
    SharesOpened,
    SurvivorList,
)
from common.summation.masked.coordinator import COORDINATOR_STEPS, MaskedCoordinator
from common.summation.masked.phases import Phase
from common.tensor_layout import TensorLayout
from tests.support.parties import IDENTITIES
from tests.support.scripted_owners import (
    LAYOUT,
    MODEL,
    ROUND,
    Fault,
    WrongDealer,
    coordinator_of,
    honest,
    present,
    run_all,
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the coordinator saves its checkpoint."""
    monkeypatch.chdir(tmp_path)


def drops_out_at(kind: type[Message], who: str = "bea") -> Fault:
    return lambda owner, request, reply: None if owner == who and isinstance(request, kind) else reply


def test_an_honest_run_adds_everybody_up(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, honest, needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert coordinator.dropped_out == {}
    assert [(step.name, step.phase) for step in coordinator.steps] == [
        ("roll call", "roll call"),
        ("sum of contributions", "sum of contributions"),
        ("sum of test metrics", "sum of test metrics"),
        ("result", "result"),
    ]
    assert coordinator.steps[1].bytes_received > 3 * 7 * 8


def test_the_costs_of_single_owners_add_up_to_those_of_a_step(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, honest, needed=3)
    run_all(coordinator)
    step = coordinator.steps[1]
    assert set(step.by_owner) == {"ada", "bea", "cyd"}
    assert all(cost.bytes_received > 7 * 8 for cost in step.by_owner.values())
    assert step.bytes_received == sum(cost.bytes_received for cost in step.by_owner.values())
    assert 0 < sum(cost.waited_seconds for cost in step.by_owner.values()) <= step.seconds


def test_the_coordinator_notes_which_rounds_it_opened_over_whom_and_which_totals_it_destroyed(
    agreement: Agreement,
) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(KeyShares), needed=2)
    coordinator.roll_call()
    total = coordinator.sum(ROUND)
    (opened,) = coordinator.sums
    assert (opened.round.kind, opened.round.layout, opened.owners) == ("contribution", LAYOUT, ("ada", "cyd"))
    assert not opened.destroyed
    coordinator.destroy(ROUND, total)
    assert opened.destroyed
    assert np.isnan(total.vector).all()


def test_a_sum_that_was_not_opened_is_not_noted_as_opened(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(KeyShares), needed=3)
    with pytest.raises(TooFewOwners):
        run_all(coordinator)
    assert coordinator.sums == []


def test_the_coordinator_notes_who_signed_the_result(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(Result), needed=2)
    run_all(coordinator)
    assert coordinator.receipts == ("ada", "cyd")


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        (RollCall, 6.0),
        (OpenSum, 6.0),
        (KeyBook, 6.0),
        (KeyShares, 6.0),
        (SurvivorList, 6.0),  # another session: it could verify nothing
        (Acknowledgements, 9.0),
        (CandidatePart, 9.0),
        (Result, 9.0),
        (Receipts, 9.0),
    ],
)
def test_the_run_continues_without_an_owner_that_drops_out_while_enough_remain(
    agreement: Agreement, kind: type[Message], total: float
) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(kind), needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, total))
    assert set(coordinator.dropped_out) == {"bea"}


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_an_owner_that_drops_out_of_its_upload_is_in_no_part_of_the_total(
    agreement: Agreement, kind: str, monkeypatch
) -> None:
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))

    def fault(owner: str, request: Message, reply: Message) -> Message | None:
        return None if owner == "bea" and isinstance(request, PartRequest) and request.part == 2 else reply

    coordinator = coordinator_of(agreement, fault, needed=2, kind=kind)
    coordinator.roll_call()
    np.testing.assert_array_equal(coordinator.sum(ROUND).vector, np.full(7, 6.0))
    assert coordinator.dropped_out == {"bea": "sum of contributions"}


@pytest.mark.parametrize("kind", [RollCall, OpenSum, KeyBook, KeyShares, SurvivorList, Acknowledgements, CandidatePart])
def test_too_few_owners_stop_the_run_and_the_error_says_who_dropped_out_where(
    agreement: Agreement, kind: type[Message]
) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(kind), needed=3)
    with pytest.raises(TooFewOwners) as caught:
        run_all(coordinator)
    assert "needs 3" in str(caught.value)
    assert caught.value.exit_code == 4
    assert "bea" in coordinator.dropped_out
    assert "bea" in caught.value.message


def test_an_owner_that_does_not_confirm_the_end_does_no_harm(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, drops_out_at(Finish), needed=3)
    coordinator.roll_call()
    coordinator.finish()
    assert coordinator.owners == ("ada", "bea", "cyd")


@pytest.mark.parametrize("kind", [RollCall, OpenSum, KeyBook, KeyShares])
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
        if owner == "bea" and isinstance(reply, MaskedPart):
            return replace(reply, payload=np.zeros(7, "<u8"))
        return reply

    coordinator = coordinator_of(agreement, poison, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert coordinator.dropped_out == {"bea": "sum of contributions"}
    with pytest.raises(RemoteProtocolError, match="the signature of bea is not valid"):
        run_all(coordinator_of(agreement, poison, needed=3))


def test_a_refusal_to_finish_does_no_harm(agreement: Agreement) -> None:
    def refuse(owner: str, request: Message, reply: Message) -> Message:
        return Refusal(code="protocol") if isinstance(request, Finish) else reply

    coordinator = coordinator_of(agreement, refuse, needed=3)
    coordinator.roll_call()
    coordinator.finish()
    assert coordinator.dropped_out == {}


def test_a_signature_of_another_owner_under_the_result_does_not_count(agreement: Agreement) -> None:
    def sign_for(owner: str, request: Message, reply: Message) -> Message:
        if owner == "bea" and isinstance(reply, ResultReceived) and isinstance(request, Result):
            body = body_of(coordinator.agreement, request)
            signature = IDENTITIES["cyd"].sign(Domain.SIGN_RECEIPT, bytes.fromhex(request.run), body)
            return replace(reply, signature=signature)
        return reply

    coordinator = coordinator_of(agreement, sign_for, needed=2)
    run_all(coordinator)
    assert coordinator.receipts == ("ada", "cyd")
    coordinator = coordinator_of(agreement, sign_for, needed=3)
    with pytest.raises(RemoteProtocolError, match="the signature of bea is not valid"):
        run_all(coordinator)


def test_the_roll_call_refuses_strangers_and_duplicates(agreement: Agreement) -> None:
    for owners, says in ((("ada", "bea", "eve"), "not on the roster"), (("ada", "bea", "bea"), "two nodes")):
        with pytest.raises(RemoteProtocolError, match=says):
            coordinator_of(agreement, honest, needed=3, owners=owners).roll_call()


def test_the_roll_call_refuses_a_node_that_only_claims_to_be_an_owner(agreement: Agreement) -> None:
    def claim(owner: str, request: Message, reply: Message) -> Message:
        return replace(reply, owner="bea") if owner == "cyd" and isinstance(reply, Present) else reply

    says = "the signature of bea is not valid.*; there is no other node for bea, cyd$"
    with pytest.raises(RemoteProtocolError, match=says):
        coordinator_of(agreement, claim, needed=2, owners=("ada", "cyd")).roll_call()


@pytest.mark.parametrize("claimed", ["a name that is taken", "another message", "a stranger"])
def test_a_node_that_answers_nonsense_does_not_keep_the_others_from_starting(
    agreement: Agreement, claimed: str
) -> None:
    def answer(owner: str, request: Message, reply: Message) -> Message:
        if owner != "cyd" or not isinstance(request, RollCall):
            return reply
        names = {"a name that is taken": "bea", "a stranger": "dan"}
        return request if claimed == "another message" else replace(reply, owner=names[claimed])

    coordinator = coordinator_of(agreement, answer, needed=2)
    coordinator.roll_call()
    assert (coordinator.owners, coordinator.dropped_out) == (("ada", "bea"), {"cyd": "roll call"})


def interrupted(reply_to_burn: Callable[[str, BurnSession], Message]) -> Fault:
    """Owners that offered something to a session of an earlier run."""

    def fault(owner: str, request: Message, reply: Message) -> Message:
        if isinstance(request, RollCall):
            return present(request, owner, pending=MODEL)
        return reply_to_burn(owner, request) if isinstance(request, BurnSession) else reply

    return fault


def test_an_interrupted_session_is_certified_as_over_before_the_run_continues(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, honest, needed=3)
    digest = coordinator.agreement.digest()
    certificates = []

    def burn(owner: str, request: BurnSession) -> Message:
        signature = sign_burned(IDENTITIES[owner], digest, request.session)
        return SessionBurned(session=request.session, owner=owner, signature=signature)

    def fault(owner: str, request: Message, reply: Message) -> Message | None:
        if isinstance(request, BurnCertificate):
            check_burned(coordinator.agreement, request.session, request.signatures)
            certificates.append(owner)
        return interrupted(burn)(owner, request, reply)

    coordinator = coordinator_of(agreement, fault, needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert certificates == ["ada", "bea", "cyd"]


def test_a_session_that_owners_helped_to_open_ends_the_agreement(agreement: Agreement) -> None:
    refuse = interrupted(lambda owner, request: Refusal(code="consent"))
    with pytest.raises(
        ConsentError, match=r"0 owners certify that it was not opened, 2 must, .*\nhint: .* new agreement"
    ):
        coordinator_of(agreement, refuse, needed=3).roll_call()


def test_an_answer_of_the_wrong_kind_is_refused(agreement: Agreement) -> None:
    def confuse(owner: str, request: Message, reply: Message) -> Message:
        return Finished(run=request.run, owner=owner) if isinstance(request, CandidatePart) else reply

    with pytest.raises(RemoteProtocolError, match="answered part 0 of average candidate for test with Finished"):
        run_all(coordinator_of(agreement, confuse, needed=3))


def test_every_sum_has_its_own_session_and_a_later_number(agreement: Agreement) -> None:
    rounds, sessions = [], []

    def watch(owner: str, request: Message, reply: Message) -> Message:
        if isinstance(request, OpenSum) and owner == "ada":
            rounds.append(request.round)
            sessions.append(request.session)
        return reply

    coordinator = coordinator_of(agreement, watch, needed=3)
    coordinator.roll_call()
    for _ in range(3):
        coordinator.sum(ROUND)
    assert rounds == [0, 1, 2]
    assert len(set(sessions)) == 3


def test_72_an_owner_whose_wrong_shares_were_corrected_is_left_out_of_the_next_sum(
    agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The total of this sum is right, and saved, before anybody is left out."""

    def lie(side: MaskedCoordinator) -> None:
        side.violations["bea"] = RemoteProtocolError("owner bea lied")
        unmask(side)

    unmask = MaskedCoordinator._unmask
    step = replace(COORDINATOR_STEPS[Phase.UNMASKING], end=lie)
    monkeypatch.setitem(COORDINATOR_STEPS, Phase.UNMASKING, step)  # type: ignore[arg-type]
    coordinator = coordinator_of(agreement, honest, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert coordinator.dropped_out == {"bea": "sum of contributions"}
    assert coordinator.receipts == ("ada", "cyd")
    coordinator = coordinator_of(agreement, honest, needed=3)
    coordinator.roll_call()
    with pytest.raises(RemoteProtocolError, match="owner bea lied"):
        coordinator.sum(ROUND)
    assert len(coordinator.checkpoint.sums) == 1


def opens_another(reply: SharesOpened) -> SharesOpened:
    return replace(reply, shares=bytes(68))


def test_71_a_dealer_that_opens_what_it_committed_to_does_no_harm(agreement: Agreement) -> None:
    dealer = WrongDealer(lambda reply: reply)
    coordinator = dealer.started(agreement, needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert (coordinator.dropped_out, coordinator.excluded) == ({}, {})
    assert len(dealer.sessions) == 2  # one for each round


@pytest.mark.parametrize("opens", [opens_another, lambda reply: None])
def test_71_a_dealer_that_does_not_is_left_out_of_another_session(
    agreement: Agreement, opens: Callable[[SharesOpened], Message | None]
) -> None:
    """The first session is certified as over before anybody could open it, so that the owners may contribute again."""
    dealer = WrongDealer(opens)
    coordinator = dealer.started(agreement, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert set(coordinator.dropped_out) == {"bea"}
    assert len(dealer.sessions) == 3
    assert coordinator.receipts == ("ada", "cyd")


def test_71_whoever_lied_stays_out_after_a_restart(agreement: Agreement) -> None:
    """bea behaves then, and its absence is not that of an owner that can be brought back."""
    coordinator = WrongDealer(opens_another).started(agreement, needed=2)
    coordinator.roll_call()
    coordinator.sum(ROUND)
    lie = {"bea": "the signature of bea is not valid (31 sign opened shares)"}
    assert coordinator.excluded == lie
    coordinator = coordinator_of(agreement, honest, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert (coordinator.excluded, coordinator.owners) == (lie, ("ada", "cyd"))


def test_71_too_few_owners_without_the_liar_need_a_new_agreement(agreement: Agreement) -> None:
    with pytest.raises(RemoteProtocolError, match="the signature of bea is not valid"):
        run_all(WrongDealer(opens_another).started(agreement, needed=3))
    with pytest.raises(RemoteProtocolError, match=r"Left out: the signature of bea .*\nhint: .* agreement without bea"):
        coordinator_of(agreement, honest, needed=3).roll_call()


def claiming(next_rounds: dict[str, int], opened: list[int]) -> Fault:
    """Owners that want the next sum to have these numbers; `opened` gets those that it has."""

    def fault(owner: str, request: Message, reply: Message) -> Message:
        if isinstance(request, OpenSum):
            opened.append(request.round)
        return present(request, owner, next_round=next_rounds[owner]) if isinstance(request, RollCall) else reply

    return fault


def test_73_the_numbers_of_sums_come_from_the_owners_and_not_from_a_clock(
    agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator whose clock was once wrong by ten years used to be locked out of its agreement for ten years."""
    opened: list[int] = []
    monkeypatch.setattr("time.time_ns", lambda: 2**61)
    coordinator = coordinator_of(agreement, claiming({"ada": 4, "bea": 7, "cyd": 0}, opened), needed=3)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 9.0))
    assert sorted(set(opened)) == [7, 8]


def test_73_an_owner_that_would_use_up_all_numbers_is_left_out(agreement: Agreement) -> None:
    """After number 2^62 - 1, no owner could open a sum under this agreement again."""
    opened: list[int] = []
    fault = claiming({"ada": 4, "bea": MAX_ROUND - 1, "cyd": 5}, opened)
    coordinator = coordinator_of(agreement, fault, needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, 6.0))
    assert sorted(set(opened)) == [5, 6]
    assert coordinator.dropped_out == {"bea": "roll call"}
    with pytest.raises(RemoteProtocolError, match=f"owner bea wants the next sum to be number {MAX_ROUND - 1}"):
        run_all(coordinator_of(agreement, fault, needed=3))


def test_the_coordinator_s_settings_are_checked(tmp_path: Path) -> None:
    from common.errors import SettingsError
    from common.settings_file import load_settings
    from server.settings import CoordinatorSettings

    (tmp_path / "coordinator.toml").write_text('agreement = "agreement.toml"\n')
    with pytest.raises(SettingsError, match=r"coordinator\.toml: output is missing"):
        load_settings(tmp_path / "coordinator.toml", CoordinatorSettings)
