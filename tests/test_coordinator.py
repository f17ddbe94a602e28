"""The coordinator over a channel that misbehaves: who is lost, when it goes on, when it stops and says so."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_bytes

import numpy as np
import pytest

from common.agreement import Agreement
from common.certificates import body_of, check_burned, sign_burned
from common.domain_separation import Domain
from common.errors import ConsentError, OwnerRefused, RemoteProtocolError, TooFewOwners
from common.messages import (
    Acknowledgements,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CandidateReceived,
    CertificateKept,
    Finish,
    Finished,
    KeyBook,
    KeyShares,
    MaskedPart,
    Message,
    OpenSum,
    Packet,
    PartRequest,
    Present,
    Receipts,
    ReceiptsKept,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
    SurvivorList,
)
from common.summation import SUMMATIONS, fixed_point
from common.summation.protocol import OwnerSide, SumTerms
from common.tensor_layout import TensorEntry, TensorLayout
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from tests.support.parties import IDENTITIES

LAYOUT = TensorLayout((TensorEntry(name="t", shape=(7,), bound=8.0),))
MODEL = "cd" * 32
Fault = Callable[[str, Message, Message], Message | None]


class ScriptedChannel:
    """Nodes 10, 11, ... are honest owners, each with a vector of threes; a fault may replace their answers."""

    def __init__(self, agreement: Agreement, owners: tuple[str, ...], fault: Fault) -> None:
        self.agreement = agreement
        self.owners = dict(enumerate(owners, 10))
        self.fault = fault
        self.sides: dict[str, OwnerSide] = {}
        self.sent: list[tuple[type[Message], ...]] = []

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        return list(self.owners)

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        self.sent.append(tuple(type(message) for message in next(iter(requests.values()))))
        for node, packet in requests.items():
            yield node, self.answers(self.owners[node], packet)

    def answers(self, owner: str, packet: Packet) -> Packet | None:
        answers = []
        for request in packet:
            answer = self.fault(owner, request, self.honest_answer(owner, request))
            if answer is None:
                return None
            answers.append(answer)
            if isinstance(answer, Refusal):
                break
        return tuple(answers)

    def honest_answer(self, owner: str, request: Message) -> Message:
        identity = IDENTITIES.get(owner, IDENTITIES["ada"])
        if isinstance(request, RollCall):
            body = bytes.fromhex(request.agreement_digest)
            signature = identity.sign(Domain.SIGN_PRESENT, bytes.fromhex(request.run), body)
            return Present(run=request.run, owner=owner, pending="", signature=signature)
        if isinstance(request, CandidatePart):
            return CandidateReceived(run=request.run, owner=owner, model=request.model, part=request.part)
        if isinstance(request, Result):
            body = body_of(self.agreement, request)
            signature = identity.sign(Domain.SIGN_RECEIPT, bytes.fromhex(request.run), body)
            return ResultReceived(run=request.run, owner=owner, signature=signature)
        if isinstance(request, BurnCertificate):
            return CertificateKept(session=request.session, owner=owner)
        if isinstance(request, Receipts):
            return ReceiptsKept(run=request.run, owner=owner)
        if isinstance(request, Finish):
            return Finished(run=request.run, owner=owner)
        if isinstance(request, BurnSession):
            return Refusal(code="consent")  # tests that need one give the answer
        return self._sum_answer(owner, request)

    def _sum_answer(self, owner: str, request: Message) -> Message:
        if isinstance(request, OpenSum):
            terms = SumTerms(
                request=request,
                layout=LAYOUT,
                roster=self.agreement.roster,
                needed_owners=self.agreement.needed_owners,
                colluders=self.agreement.colluders,
            )
            kind = SUMMATIONS[self.agreement.summation.kind].owner
            self.sides[owner], reply = kind.open(terms, IDENTITIES[owner], token_bytes)
            return reply
        encoded = fixed_point.encode(LAYOUT, np.full(7, 3.0), 3)
        self.sides[owner], reply = self.sides[owner].answer(request, encoded, token_bytes)
        return reply


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the coordinator keeps its checkpoint."""
    monkeypatch.chdir(tmp_path)


def coordinator_of(
    agreement: Agreement,
    fault: Fault,
    needed: int,
    owners: tuple[str, ...] = ("ada", "bea", "cyd"),
    kind: str = "masked",
) -> Coordinator:
    summation = agreement.summation.model_copy(update={"kind": kind})
    agreement = agreement.model_copy(update={"min_owners": needed, "summation": summation})
    channel = ScriptedChannel(agreement, owners, fault)
    checkpoint = Checkpoint.open(Path("checkpoint"), agreement.digest())
    identity = IDENTITIES["coordinator"]
    return Coordinator(channel=channel, agreement=agreement, identity=identity, checkpoint=checkpoint, num_steps=3)


def run_all(coordinator: Coordinator) -> np.ndarray:
    coordinator.roll_call()
    total = coordinator.sum("contribution", LAYOUT)
    coordinator.send_candidate("average", "test", LAYOUT, np.zeros(7, dtype=np.float32))
    coordinator.send_result("average", MODEL)
    coordinator.sum("test", LAYOUT)
    coordinator.confirm_result()
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
    assert coordinator.steps[1].bytes_received > 3 * 7 * 8


def test_what_each_owner_cost_is_noted_and_adds_up(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, honest, needed=3)
    run_all(coordinator)
    step = coordinator.steps[1]
    assert set(step.by_owner) == {"ada", "bea", "cyd"}
    assert all(cost.bytes_received > 7 * 8 for cost in step.by_owner.values())
    assert step.bytes_received == sum(cost.bytes_received for cost in step.by_owner.values())
    assert 0 < sum(cost.waited_seconds for cost in step.by_owner.values()) <= step.seconds


def test_what_was_opened_over_whom_and_what_was_destroyed_is_noted(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, lost_at(KeyShares), needed=2)
    coordinator.roll_call()
    total = coordinator.sum("contribution", LAYOUT)
    (opened,) = coordinator.sums
    assert (opened.statistic, opened.layout, opened.owners) == ("contribution", LAYOUT, ("ada", "cyd"))
    assert not opened.destroyed
    coordinator.destroy("contribution", total)
    assert opened.destroyed
    assert np.isnan(total.vector).all()


def test_a_sum_that_was_not_opened_is_not_said_to_be(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, lost_at(KeyShares), needed=3)
    with pytest.raises(TooFewOwners):
        run_all(coordinator)
    assert coordinator.sums == []


def test_who_signed_the_result_is_noted(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, lost_at(Result), needed=2)
    run_all(coordinator)
    assert coordinator.receipts == ("ada", "cyd")


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        (RollCall, 6.0),
        (OpenSum, 6.0),
        (KeyBook, 6.0),
        (KeyShares, 6.0),
        (SurvivorList, 9.0),
        (Acknowledgements, 9.0),
        (CandidatePart, 9.0),
        (Result, 9.0),
        (Receipts, 9.0),
    ],
)
def test_the_run_goes_on_without_a_lost_owner_while_enough_remain(
    agreement: Agreement, kind: type[Message], total: float
) -> None:
    coordinator = coordinator_of(agreement, lost_at(kind), needed=2)
    np.testing.assert_array_equal(run_all(coordinator), np.full(7, total))
    assert set(coordinator.lost) == {"bea"}


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_an_owner_lost_in_its_upload_is_in_no_part_of_the_total(agreement: Agreement, kind: str, monkeypatch) -> None:
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))

    def fault(owner: str, request: Message, reply: Message) -> Message | None:
        return None if owner == "bea" and isinstance(request, PartRequest) and request.part == 2 else reply

    coordinator = coordinator_of(agreement, fault, needed=2, kind=kind)
    coordinator.roll_call()
    np.testing.assert_array_equal(coordinator.sum("contribution", LAYOUT).vector, np.full(7, 6.0))
    assert coordinator.lost == {"bea": "sum of contribution"}


@pytest.mark.parametrize("kind", [RollCall, OpenSum, KeyBook, KeyShares, SurvivorList, Acknowledgements, CandidatePart])
def test_too_few_owners_stop_the_run_and_say_who_was_lost_where(agreement: Agreement, kind: type[Message]) -> None:
    coordinator = coordinator_of(agreement, lost_at(kind), needed=3)
    with pytest.raises(TooFewOwners) as caught:
        run_all(coordinator)
    assert "needs 3" in str(caught.value)
    assert caught.value.exit_code == 4
    assert "bea" in coordinator.lost


def test_an_owner_that_forgets_to_confirm_the_end_spoils_nothing(agreement: Agreement) -> None:
    coordinator = coordinator_of(agreement, lost_at(Finish), needed=3)
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
    assert coordinator.lost == {"bea": "sum of contribution"}
    with pytest.raises(RemoteProtocolError, match="the signature of bea does not hold"):
        run_all(coordinator_of(agreement, poison, needed=3))


def test_a_refusal_to_finish_spoils_nothing(agreement: Agreement) -> None:
    def refuse(owner: str, request: Message, reply: Message) -> Message:
        return Refusal(code="protocol") if isinstance(request, Finish) else reply

    coordinator = coordinator_of(agreement, refuse, needed=3)
    coordinator.roll_call()
    coordinator.finish()
    assert coordinator.lost == {}


def test_a_signature_of_another_under_the_result_is_none(agreement: Agreement) -> None:
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
    with pytest.raises(RemoteProtocolError, match="the signature of bea does not hold"):
        run_all(coordinator)


def test_a_stranger_and_a_double_are_refused_at_the_roll_call(agreement: Agreement) -> None:
    for owners, says in ((("ada", "bea", "eve"), "not on the roster"), (("ada", "bea", "bea"), "two nodes")):
        with pytest.raises(RemoteProtocolError, match=says):
            coordinator_of(agreement, honest, needed=2, owners=owners).roll_call()


def test_a_node_that_only_claims_to_be_an_owner_is_refused_at_the_roll_call(agreement: Agreement) -> None:
    def claim(owner: str, request: Message, reply: Message) -> Message:
        return replace(reply, owner="bea") if owner == "cyd" and isinstance(reply, Present) else reply

    with pytest.raises(RemoteProtocolError, match="the signature of bea does not hold"):
        coordinator_of(agreement, claim, needed=2, owners=("ada", "cyd")).roll_call()


def interrupted(reply_to_burn: Callable[[str, BurnSession], Message]) -> Fault:
    """Owners that offered something to a session of an earlier run."""

    def fault(owner: str, request: Message, reply: Message) -> Message:
        if isinstance(request, RollCall):
            body = bytes.fromhex(request.agreement_digest) + MODEL.encode()
            signature = IDENTITIES[owner].sign(Domain.SIGN_PRESENT, bytes.fromhex(request.run), body)
            return Present(run=request.run, owner=owner, pending=MODEL, signature=signature)
        return reply_to_burn(owner, request) if isinstance(request, BurnSession) else reply

    return fault


def test_an_interrupted_session_is_certified_as_over_before_the_run_goes_on(agreement: Agreement) -> None:
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


def test_a_session_that_owners_helped_to_open_ends_the_agreement_and_says_so(agreement: Agreement) -> None:
    refuse = interrupted(lambda owner, request: Refusal(code="consent"))
    with pytest.raises(ConsentError, match=r"0 owners certify that it was not, 2 must. .* needs a new agreement"):
        coordinator_of(agreement, refuse, needed=3).roll_call()


def test_an_answer_of_the_wrong_kind_is_refused(agreement: Agreement) -> None:
    def confuse(owner: str, request: Message, reply: Message) -> Message:
        return Finished(run=request.run, owner=owner) if isinstance(request, CandidatePart) else reply

    with pytest.raises(RemoteProtocolError, match="answered a candidate with Finished"):
        run_all(coordinator_of(agreement, confuse, needed=3))


def test_every_sum_is_a_session_and_a_later_round_of_its_own(agreement: Agreement) -> None:
    rounds, sessions = [], []

    def watch(owner: str, request: Message, reply: Message) -> Message:
        if isinstance(request, OpenSum) and owner == "ada":
            rounds.append(request.round)
            sessions.append(request.session)
        return reply

    coordinator = coordinator_of(agreement, watch, needed=3)
    coordinator.roll_call()
    for _ in range(3):
        coordinator.sum("contribution", LAYOUT)
    assert rounds == sorted(set(rounds))
    assert len(set(sessions)) == 3


def test_settings_of_the_coordinator_are_checked(tmp_path: Path) -> None:
    from common.errors import SettingsError
    from common.settings_file import load_settings
    from server.settings import CoordinatorSettings

    (tmp_path / "coordinator.toml").write_text('agreement = "agreement.toml"\n')
    with pytest.raises(SettingsError, match=r"coordinator\.toml: output is missing"):
        load_settings(tmp_path / "coordinator.toml", CoordinatorSettings)
