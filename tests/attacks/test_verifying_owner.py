"""Attacks 123, 124, 126, 131 and 211 to 213: a coordinator that tries each shortcut around the check of one honest run.

One owner is sent every message that must be refused, just before the honest one in its place. At the end the run has
succeeded, so the owner refused those and nothing else.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client import verification
from client.owner import Owner
from client.state import ReceivedRecord
from client.verification import check_no_evidence
from common.agreement import Agreement
from common.certificates import Delivered, deliveries_digest, nonce_body, nonces_digest, result_body
from common.domain_separation import Domain
from common.errors import AmalgramError, ConsentError, LocalProtocolError, RemoteProtocolError, WrongModel
from common.identity import Identity, verify
from common.mapped import sha256_of
from common.messages import (
    Acknowledgements,
    BurnSession,
    CandidatePart,
    CheckKeys,
    CheckShares,
    CorrectionPart,
    Draw,
    Drawn,
    KeyShares,
    Message,
    OpeningChecked,
    OpenSum,
    Result,
    UploadsOpened,
)
from common.packed import packed, unpacked
from common.publication import Publication, read_publication
from common.schedule import Round, Schedule, schedule_of
from common.summation.pairwise import public_key
from common.summation.protocol import SessionOver, Total
from common.summation.records import Nonce, Signed
from deploy.cli import cli
from server.coordinator import Coordinator
from server.merge import run_merge
from tests.support.owner_process import RUN, delivered_by, fast_forward, opening_of, roll_call, signed_delivery
from tests.support.parties import OwnersChannel, Parties, one_may_drop_out, parties_of, parties_with_method

FIRST = 0  # the node of the owner that is attacked


@dataclass
class Attempt:
    """What an owner was asked, and why it must refuse."""

    request: Message
    error: type[AmalgramError]
    says: str


class TryingChannel(OwnersChannel):
    """Sends the first owner what `attempts` makes of a message, before the message itself; may `falsify` that, and
    `change` the reply.
    """

    def __init__(self, parties: Parties) -> None:
        super().__init__(parties.files)
        self.parties = parties
        self.schedule: Schedule = schedule_of(parties.agreement, parties.plan)
        self.tried: list[str] = []
        self.checks: dict[type[Message], Callable[[Owner, Message], None]] = {}
        self.attempts: dict[type[Message], Callable[[Message], Iterator[Attempt]]] = {}
        self.change: Callable[[Message], Message] = lambda reply: reply
        self.falsify: Callable[[Message], Message] = lambda request: request

    def answer(self, node: int, request: Message) -> Message | None:
        if node == FIRST:
            if type(request) in self.checks:
                self.checks[type(request)](self.owner, request)
            for attempt in self.attempts.get(type(request), lambda _: iter(()))(request):
                with pytest.raises(attempt.error, match=attempt.says):
                    super().answer(node, attempt.request)
                self.tried.append(attempt.says)
            reply = super().answer(node, self.falsify(request))
            return None if reply is None else self.change(reply)
        return super().answer(node, request)

    @property
    def owner(self) -> Owner:
        return Owner(self.files[FIRST])

    @property
    def check(self) -> Round:
        return self.schedule.find("check")

    def signed(self, request: CorrectionPart, nonces: bytes) -> CorrectionPart:
        """The same corrections as if they followed from other nonces, which the coordinator signs."""
        numbers = unpacked(request.payload, self.schedule.delivery_at(request.position, "correction").layout.size)
        sent = Delivered(position=request.position, model=nonces_digest(nonces), digest=sha256_of(numbers))
        return replace(request, nonces=nonces, signature=signed_delivery(self.parties, sent, request.run))

    def opening(self, position: int) -> OpenSum:
        owner = self.owner
        return opening_of(
            self.parties,
            self.schedule.round_at(position),
            owner.ledger.next_round,
            owner.state.run.delivered,
            owner.state.run.run,
        )

    def keys(self, nonces: bytes) -> CheckKeys:
        run, digest = self.owner.state.run.run, self.parties.agreement.digest()
        return CheckKeys(run=run, agreement_digest=digest, position=self.check.position, nonces=nonces)

    def key_shares(self) -> KeyShares:
        """Asks for the first part of what is to be measured next."""
        kept = self.owner.state.open_round
        assert kept is not None
        return KeyShares(session=kept.open_sum.session, deliveries=b"", manifests=b"", opened=b"")


@pytest.fixture
def trying(trained_folder: Path, tmp_path: Path) -> Iterator[TryingChannel]:
    """An agreement on the plain average, whose models are verified."""
    with parties_with_method(trained_folder, tmp_path, "average", verified=True) as parties:
        (parties.output / ".amalgram").touch()
        yield TryingChannel(parties)


@contextmanager
def as_if(owner: Owner, **changes: object) -> Iterator[None]:
    """The owner's run with other fields, for a moment."""
    before = owner.state.run
    owner.state.update_run(**changes)
    yield
    owner.state.update_run(**{name: getattr(before, name) for name in changes})


def test_124_no_step_of_a_check_is_skipped_or_made_with_other_numbers(trying: TryingChannel) -> None:
    parties, metrics = trying.parties, trying.schedule.events[-1].position
    drawn: list[Message] = []

    def before_draw(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, Draw)
        if request.position == trying.check.position:
            return
        skipped = "went on with sum of test metrics, but correction is due"
        yield Attempt(trying.opening(metrics), RemoteProtocolError, skipped)
        early = replace(request, position=trying.check.position)
        yield Attempt(early, RemoteProtocolError, "the key of a check that its corrections do not precede")
        kept = trying.owner.state.open_round
        assert kept is not None
        assert kept.kind == "contribution"
        relayed = UploadsOpened(session=kept.open_sum.session, proofs=b"", payload=np.zeros(1, dtype="<u8"))
        yield Attempt(relayed, RemoteProtocolError, "opened a sum that is not open to all owners")

    def before_correction(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, CorrectionPart)
        again = [trying.owner.answer(replace(sent[Draw], position=request.position)) for _ in range(2)]
        assert again[0] == again[1]
        drawn.extend(again)
        nonces = Nonce.unpack_all(request.nonces)
        other = Nonce.pack_all([replace(each, nonce=bytes(32)) for each in nonces])
        without = Nonce.pack_all(nonces[1:])
        with as_if(trying.owner, drawn=None):  # a second nonce, drawn and signed by this owner, is not its nonce
            second = trying.owner.answer(sent[Draw])
        assert isinstance(second, Drawn)
        mine = replace(nonces[0], nonce=bytes.fromhex(second.nonce), signature=second.signature)
        for changed in (Nonce.pack_all([mine, *nonces[1:]]), other, without):
            says = "do not follow from this owner's nonce"
            yield Attempt(trying.signed(request, changed), RemoteProtocolError, says)
        yield Attempt(replace(request, signature=bytes(64)), RemoteProtocolError, "signature")
        with as_if(trying.owner, summed=()):  # it came back after the sum that is merged
            yield Attempt(request, RemoteProtocolError, "a check of a merge that holds nothing of this owner")

    sent: dict[type[Message], Any] = {}  # the first of each kind

    def note(owner: Owner, request: Message) -> None:
        sent.setdefault(type(request), request)

    def before_keys(request: Message) -> Iterator[Attempt]:
        """The keys of others than those who contributed: the shares would not add up to zero."""
        assert isinstance(request, CheckKeys)
        assert not trying.owner.state.has_array("vector")  # the sum of metrics is open, and nothing was measured
        correction = sent[CorrectionPart]
        size = trying.schedule.delivery_at(correction.position, "correction").layout.size
        other = packed(unpacked(correction.payload, size) * np.float32(0.5))  # c, now that s is known
        changed = trying.signed(replace(correction, payload=other), correction.nonces)
        yield Attempt(changed, ConsentError, "a second version of")
        for bent, says in (
            (unpacked(correction.payload, size)[:-1], f"there are {size - 1}, expected {size}"),
            (packed(np.zeros(size + 1, np.float32)), f"does not hold exactly {size}"),
            (packed(np.zeros(2**24, np.float32)), f"does not hold exactly {size}"),  # 64 MB in a few kilobytes
            (correction.payload[:-1], f"does not hold exactly {size}"),
        ):
            yield Attempt(replace(correction, payload=bent), RemoteProtocolError, says)
        fewer = replace(request, nonces=Nonce.pack_all(Nonce.unpack_all(request.nonces)[:2]))
        says = "without all owners whose contributions are merged"
        yield Attempt(fewer, RemoteProtocolError, says)

    def before_opening(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, UploadsOpened)
        if request.session in trying.owner.state.run.opened:
            return
        if trying.owner.state.run.check is None:
            other = replace(request, session="ab" * 32)
            yield Attempt(other, RemoteProtocolError, "opened another sum than the last one")
            return
        yield Attempt(trying.key_shares(), RemoteProtocolError, "average candidate for test is not verified")

    def before_shares(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, KeyShares)
        owner = trying.owner
        kept = owner.state.open_round
        assert kept is not None
        if kept.kind != "metrics":
            return
        folder = owner.state.folder / "run"
        assert not list(folder.glob("own-*.bin"))  # what was contributed is proved, and deleted
        with as_if(owner, verified=()):
            yield Attempt(request, RemoteProtocolError, "is not verified")
        assert owner.answer(sent[UploadsOpened]) == OpeningChecked(
            session=sent[UploadsOpened].session, owner=owner.name
        )  # nothing new
        yield Attempt(sent[CheckKeys], RemoteProtocolError, "check shares before this owner's key")
        says = "the key of a check that this owner has added up"
        yield Attempt(replace(sent[Draw], position=trying.check.position), RemoteProtocolError, says)

    def before_contributions(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, OpenSum)
        if trying.schedule.round_at(request.position).kind == "contribution":
            early = Draw(run=request.run, agreement_digest=request.agreement_digest, position=trying.check.position - 1)
            yield Attempt(early, RemoteProtocolError, "went on with correction, but sum of contributions is due")

    trying.checks = dict.fromkeys((Draw, CorrectionPart, CheckKeys, UploadsOpened), note)
    trying.attempts = {
        Draw: before_draw,
        CorrectionPart: before_correction,
        CheckKeys: before_keys,
        UploadsOpened: before_opening,
        KeyShares: before_shares,
        OpenSum: before_contributions,
    }
    run_merge(parties.coordinator, trying)
    assert len(trying.tried) == 20
    assert (parties.output / "model").is_dir()


def test_124_nonces_of_others_that_are_invented_old_or_missing(trying: TryingChannel) -> None:
    """The coordinator knows the first owner's nonce. It would choose the others' so that rho hides its false model."""
    identity = trying.parties.identities["cinema"]
    assert trying.parties.agreement.owner_names.index("cinema") == 1

    def before_correction(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, CorrectionPart)
        first, second, third = Nonce.unpack_all(request.nonces)
        position, delivered = request.position, deliveries_digest(trying.owner.state.run.delivered)
        verify(
            identity.public_key,
            Domain.SIGN_NONCE,
            bytes.fromhex(request.run),
            "cinema",
            nonce_body(position, delivered, second.nonce),
            second.signature,
        )

        def signed(run: str, position: int, delivered: str, by: Identity = identity) -> Nonce:
            """A nonce that an owner drew, but not for this check."""
            body = nonce_body(position, delivered, bytes(32))
            return Nonce(1, bytes(32), by.sign(Domain.SIGN_NONCE, bytes.fromhex(run), body))

        for false in (
            replace(second, nonce=bytes(32)),
            signed(request.run, position, delivered, by=replace(trying.parties.identities["phones"], name="cinema")),
            signed("ab" * 32, position, delivered),
            signed(request.run, position - 1, delivered),
            signed(request.run, position, deliveries_digest([])),
        ):
            nonces = Nonce.pack_all([first, false, third])
            says = "the signature of cinema is not valid"
            yield Attempt(trying.signed(request, nonces), RemoteProtocolError, says)
        for fewer in ([first, second], [first]):
            says = "from the nonces of all owners whose contributions are merged"
            yield Attempt(trying.signed(request, Nonce.pack_all(fewer)), RemoteProtocolError, says)

    trying.attempts = {CorrectionPart: before_correction}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 7


def test_124_an_owner_that_signs_its_nonce_badly_is_named_before_the_others_are_sent_it(trying: TryingChannel) -> None:
    """They would refuse, and the coordinator would have spoilt the check."""
    trying.change = lambda reply: replace(reply, signature=bytes(64)) if isinstance(reply, Drawn) else reply
    with pytest.raises(RemoteProtocolError, match="the signature of hotel is not valid"):
        run_merge(trying.parties.coordinator, trying)
    assert CorrectionPart not in [kind for packet in trying.kinds for kind in packet]


def test_124_a_model_that_only_one_owner_is_sent(trying: TryingChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' nonces are for other models, so their signatures are not valid for this owner."""

    def backdoor(request: Message) -> Message:
        if isinstance(request, CandidatePart):
            changed = replace(request, payload=request.payload * np.float32(1.0001))
            return replace(changed, signature=signed_delivery(trying.parties, delivered_by(changed), request.run))
        if isinstance(request, CorrectionPart):
            nonces = Nonce.unpack_all(request.nonces)
            return trying.signed(request, Nonce.pack_all(nonces))
        return request

    def take_any_nonce(self: Coordinator, owner: str, position: int, reply: Message) -> Nonce:
        assert isinstance(reply, Drawn)
        return Nonce(self.agreement.owner_names.index(owner), bytes.fromhex(reply.nonce), reply.signature)

    trying.falsify = backdoor
    monkeypatch.setattr(Coordinator, "_nonce", take_any_nonce)
    with pytest.raises(RemoteProtocolError, match="the signature of cinema is not valid"):
        run_merge(trying.parties.coordinator, trying)
    assert trying.owner.state.run.scores == ()


def test_131_a_check_is_not_drawn_again_until_it_suits_the_coordinator(trying: TryingChannel) -> None:
    """It knows the random numbers of a check once it has all keys. An honest owner draws one, for one list."""

    def draw_again(owner: Owner, request: Message) -> None:
        assert isinstance(request, Draw)
        answers = {str(trying.owner.answer(request)) for _ in range(3)}
        assert len(answers) == 1
        trying.tried.append("another draw")

    def before_opening(request: Message) -> Iterator[Attempt]:
        """After the owner gave its shares, a colluding owner signs another key for the same check."""
        assert isinstance(request, UploadsOpened)
        check = trying.owner.state.run.check
        if check is None:
            return
        first, *others, last = Nonce.unpack_all(bytes.fromhex(check.keys))
        (name, identity), run = list(trying.parties.identities.items())[2], trying.owner.state.run.run
        other = public_key(bytes(32), run)
        body = nonce_body(check.position, check.delivered, other)
        signature = identity.sign(Domain.SIGN_NONCE, bytes.fromhex(run), body)
        assert name == trying.parties.agreement.owner_names[last.owner]
        changed = Nonce.pack_all([first, *others, Nonce(last.owner, other, signature)])
        yield Attempt(trying.keys(changed), RemoteProtocolError, "the same check with other keys")
        again = [trying.owner.answer(trying.keys(bytes.fromhex(check.keys))) for _ in range(2)]
        assert all(isinstance(each, CheckShares) for each in again)
        payloads = {each.payload.tobytes() for each in again if isinstance(each, CheckShares)}
        assert {hashlib.sha256(each).hexdigest() for each in payloads} == {check.upload}

    trying.checks = {Draw: draw_again}
    trying.attempts = {UploadsOpened: before_opening}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 3


def test_131_nothing_is_drawn_for_a_check_while_an_earlier_one_is_pending(trained_folder: Path, tmp_path: Path) -> None:
    """An owner keeps one draw at a time. Otherwise, if it may miss sums, a coordinator could have it pass over a check,
    or draw again for it.
    """
    with parties_with_method(trained_folder, tmp_path, "refit", verified=True) as parties:
        owner, schedule = Owner(parties.files["hotel"]), schedule_of(parties.agreement, parties.plan)
        first, second = schedule.of_kind("correction")

        def draw(position: int) -> Message:
            return owner.answer(Draw(run=RUN, agreement_digest=parties.agreement.digest(), position=position))

        owner.answer(roll_call(parties))
        fast_forward(owner, first.position)
        drawn = draw(first.position)
        fast_forward(owner, second.position)  # as if it had come back after sums that it may miss
        record = ReceivedRecord(position=second.position, model="", digest="ab" * 32, signature="")
        owner.state.update_run(received=(record,))
        for position in (second.position, second.position + 1):  # for a nonce, and for a key
            with pytest.raises(RemoteProtocolError, match=f"has not added up the check at {first.position + 1}"):
                draw(position)
        assert owner.state.run.check is None
        assert owner.state.run.drawn is not None
        blind = owner.state.run.drawn.blind
        fast_forward(owner, first.position)
        assert draw(first.position) == drawn
        fast_forward(owner, second.position)
        owner.state.update_run(verified=tuple(claim.delivery for claim in first.claims))
        assert isinstance(draw(second.position), Drawn)
        assert isinstance(draw(second.position + 1), Drawn)
        # Attack 128: with another factor for the same scales, their mean would tell them.
        assert owner.state.run.drawn.blind == blind


def test_211_keys_of_others_that_are_invented_old_or_missing(trying: TryingChannel) -> None:
    """With a key that it made, the coordinator would know a mask; with one that it chose, the random numbers."""
    identity = trying.parties.identities["cinema"]

    def before_keys(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, CheckKeys)
        check = trying.owner.state.run.check
        assert check is not None
        first, second, third = Nonce.unpack_all(request.nonces)
        position, delivered, key = request.position, check.delivered, public_key(bytes(32), request.run)

        def signed(run: str, position: int, delivered: str, by: Identity = identity) -> Nonce:
            body = nonce_body(position, delivered, key)  # the key as it is then
            return Nonce(1, key, by.sign(Domain.SIGN_NONCE, bytes.fromhex(run), body))

        phones = replace(trying.parties.identities["phones"], name="cinema")
        for false in (
            replace(second, nonce=key),
            signed(request.run, position, delivered, by=phones),
            signed("ab" * 32, position, delivered),
            signed(request.run, position - 1, delivered),  # as a nonce of the corrections
            signed(request.run, position, deliveries_digest(trying.owner.state.run.delivered[:-1])),  # before these
        ):
            changed = trying.keys(Nonce.pack_all([first, false, third]))
            yield Attempt(changed, RemoteProtocolError, "the signature of cinema is not valid")
        for mine in (replace(first, nonce=key), None):
            changed = trying.keys(Nonce.pack_all([*([mine] if mine else []), second, third]))
            yield Attempt(changed, RemoteProtocolError, "without this owner's key")
        key = bytes(32)
        low_order = Nonce.pack_all([first, signed(request.run, position, delivered), third])
        yield Attempt(trying.keys(low_order), RemoteProtocolError, "a point of low order")
        # As if this owner alone had been sent another correction. Several could hide together what one cannot.
        other, key = deliveries_digest([]), first.nonce
        hotel = trying.parties.identities["hotel"]
        with as_if(trying.owner, check=check.model_copy(update={"delivered": other})):
            mine = replace(signed(request.run, position, other, by=hotel), owner=0)
            changed = trying.keys(Nonce.pack_all([mine, second, third]))
            yield Attempt(changed, RemoteProtocolError, "the signature of cinema is not valid")

    trying.attempts = {CheckKeys: before_keys}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 9


def test_212_shares_that_their_owner_did_not_sign(trying: TryingChannel) -> None:
    """The coordinator would report a zero. Every owner finds what it takes from a vector, or leaves out."""

    def before_opening(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, UploadsOpened)
        check = trying.owner.state.run.check
        if check is None:
            return
        size = trying.check.layout.size
        payload, (first, *others) = request.payload.copy(), Signed.unpack_all(request.proofs)
        payload[size] += 1
        yield Attempt(replace(request, payload=payload), RemoteProtocolError, "the signature of cinema is not valid")
        swapped = np.concatenate(
            [request.payload[size : 2 * size], request.payload[:size], request.payload[2 * size :]]
        )
        yield Attempt(replace(request, payload=swapped), RemoteProtocolError, "the signature of hotel is not valid")
        whole = "not one signed vector of every owner"
        for fewer in (
            replace(request, payload=request.payload[size:], proofs=Signed.pack_all(others)),
            replace(request, payload=request.payload[:-1]),
            replace(request, proofs=Signed.pack_all([first, *others[:-1]])),
        ):
            yield Attempt(fewer, RemoteProtocolError, whole)
        shape = "another shape than was agreed"
        yield Attempt(replace(request, payload=request.payload.astype("<u4")), RemoteProtocolError, shape)

    trying.attempts = {UploadsOpened: before_opening}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 6


def test_212_an_owner_that_signs_its_shares_badly_is_named(trying: TryingChannel) -> None:
    trying.change = lambda reply: replace(reply, signature=bytes(64)) if isinstance(reply, CheckShares) else reply
    with pytest.raises(RemoteProtocolError, match="the signature of hotel is not valid"):
        run_merge(trying.parties.coordinator, trying)
    assert not any(isinstance(message, UploadsOpened) for packet in trying.asked for message in packet)


def test_213_shares_that_have_changed_do_not_leave_under_the_same_masks(trying: TryingChannel) -> None:
    """Two vectors under the same masks would show their difference."""
    honest = verification.shares

    def changed(owner: Owner, round_: Round, keys_digest: bytes) -> Iterator[tuple[str, NDArray[np.uint64]]]:
        yield from ((name, array + np.uint64(1)) for name, array in honest(owner, round_, keys_digest))

    def before_opening(request: Message) -> Iterator[Attempt]:
        check = trying.owner.state.run.check
        if check is None:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "shares", changed)
            says = "the check shares have changed since they were sent"
            yield Attempt(trying.keys(bytes.fromhex(check.keys)), LocalProtocolError, says)

    trying.attempts = {UploadsOpened: before_opening}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 1


def test_126_a_result_for_other_owners_than_those_that_verified_is_not_signed(trying: TryingChannel) -> None:
    def before_result(request: Message) -> Iterator[Attempt]:
        assert isinstance(request, Result)
        publication = read_publication(request.publication)
        fewer = publication.model_copy(update={"owners": publication.owners[:2]})
        yield Attempt(false_result(trying, request, fewer), RemoteProtocolError, "other owners than those")

    trying.attempts = {Result: before_result}
    run_merge(trying.parties.coordinator, trying)
    assert len(trying.tried) == 1


@pytest.mark.parametrize("lie", ["metrics", "metrics and a file", "model"])
def test_126_a_result_that_is_not_what_was_verified_is_kept_with_its_signature(
    trying: TryingChannel, capsys: pytest.CaptureFixture[str], lie: str
) -> None:
    sent: list[Result] = []

    def falsify(request: Message) -> Message:
        if isinstance(request, Result):
            other = replace(request, model_digest="ab" * 32)
            model = false_result(trying, other, read_publication(request.publication))
            metrics = false_metrics(trying, request, with_a_file=lie == "metrics and a file")
            sent.append(model if lie == "model" else metrics)
            return sent[0]
        return request

    trying.falsify = falsify
    with pytest.raises(WrongModel, match="the result that the coordinator signed is not what the owners verified"):
        run_merge(trying.parties.coordinator, trying)
    assert not (trying.parties.output / "model").exists()
    assert not trying.owner.ledger.has_signed
    capsys.readouterr()
    assert cli(["verify", str(trying.parties.files["hotel"])], standalone_mode=False) == WrongModel.exit_code
    said = capsys.readouterr().out
    assert "the coordinator signed a result that is not what the owners verified" in said
    assert f"The result names average, SHA-256 {sent[0].model_digest}.\n" in said
    assert "The coordinator's signature under it is valid." in said
    if lie == "model":
        assert "\n  the coordinator published another model than the one that this owner tested\n" in said
        assert re.search("\n  tested was average, SHA-256 [0-9a-f]{64}\n", said)
    else:
        added = r"hotel says that it added up accuracy 0\.[0-9]{4}"
        assert re.search(rf"test, average: it says accuracy 1\.0000, .*; {added}", said)
    assert "What hotel tested and added up is its own word" in said
    trying.owner.state.start_run(RUN, trying.parties.agreement.digest())  # as if killed before it forgot the run
    with pytest.raises(WrongModel, match="the result that the coordinator signed"):
        check_no_evidence(trying.owner)
    assert not (trying.owner.state.folder / "run").exists()


def test_126_totals_that_an_owner_is_not_shown_are_not_signed(
    trying: TryingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever never sees the last sum could be told any metrics."""
    relay = Coordinator._relay_uploads

    def relay_no_metrics(self: Coordinator, round: Round, total: Total) -> None:
        if round.kind != "metrics":
            relay(self, round, total)

    monkeypatch.setattr(Coordinator, "_relay_uploads", relay_no_metrics)
    with pytest.raises(RemoteProtocolError, match="without showing this owner the sum that it helped to open"):
        run_merge(trying.parties.coordinator, trying)
    assert not (trying.parties.output / "model").exists()


def false_metrics(trying: TryingChannel, request: Result, *, with_a_file: bool = False) -> Result:
    """The result with an accuracy of 1.0 for every model, as the coordinator signs it. `with_a_file`: and with one that
    no owner would have written, which alone would be refused without a record.
    """
    publication = read_publication(request.publication)
    better = {name: mean.model_copy(update={"accuracy": 1.0}) for name, mean in publication.test.items()}
    files = publication.files | ({"notes.txt": "ab" * 32} if with_a_file else {})
    return false_result(trying, request, publication.model_copy(update={"test": better, "files": files}))


def false_result(trying: TryingChannel, request: Result, publication: Publication) -> Result:
    """The result with another publication, as the coordinator signs it."""
    content, digest = publication.canonical_bytes(), deliveries_digest(trying.owner.state.run.delivered)
    body = result_body(trying.parties.agreement, request.model, request.model_digest, digest, content)
    signature = trying.parties.identities["coordinator"].sign(Domain.SIGN_RESULT, bytes.fromhex(request.run), body)
    return replace(request, publication=content, signature=signature)


@pytest.mark.parametrize("by", ["another session is burned", "nobody signed the survivors"])
def test_126_totals_of_a_sum_that_an_owner_was_made_to_forget_are_not_signed(
    trying: TryingChannel, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """An owner wipes the secrets of a sum if it is told to burn a session, or if a message breaks the rules."""
    relay = Coordinator._relay_uploads

    def relay_no_metrics(self: Coordinator, round: Round, total: Total) -> None:
        if round.kind != "metrics":
            relay(self, round, total)

    def forget(owner: Owner, request: Message) -> None:
        assert isinstance(request, Result)
        kept = owner.state.open_round
        assert kept is not None
        if by == "another session is burned":
            owner.answer(BurnSession(run=request.run, session="ab" * 32))
        else:
            with pytest.raises(SessionOver):
                owner.answer(Acknowledgements(session=kept.open_sum.session, signatures=b""))
        trying.tried.append(by)

    monkeypatch.setattr(Coordinator, "_relay_uploads", relay_no_metrics)
    trying.checks = {Result: forget}
    trying.falsify = lambda each: false_metrics(trying, each) if isinstance(each, Result) else each
    with pytest.raises(RemoteProtocolError, match="without showing this owner the sum that it helped to open"):
        run_merge(trying.parties.coordinator, trying)
    assert trying.tried == [by]


def made_up(agreement: Agreement, round_: Round) -> Total:
    """A total of metrics in which every model is always right, and nobody is named."""
    vector, names = np.zeros(round_.layout.size), agreement.owner_names
    for model in round_.models:
        round_.layout.read(vector, f"{model}/mean")[:] = (len(names),) * 3
        round_.layout.read(vector, f"{model}/pooled")[:] = 100
    return Total(layout=round_.layout, vector=vector, owners=names, roster_size=len(names))


def leave_unopened(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Every owner verifies the models and gives its part of a sum of metrics. The coordinator has nobody open it, shows
    it to nobody, makes up a total and goes on.
    """
    honest = Coordinator.sum

    def not_opened(self: Coordinator, round: Round) -> Total:
        if (round.kind, round.split) != ("metrics", split):
            return honest(self, round)
        self.exchange.begin_step(round.name, round.phase)
        _, side = self._new_sum(round)
        for _ in ("AdvertiseKeys", "ShareKeys", "MaskedInput"):
            for owner, reply in self.exchange.ask(side.requests()):
                assert reply is not None
                side.receive(owner, reply)
            side.end_step()
        return made_up(self.agreement, round)

    monkeypatch.setattr(Coordinator, "sum", not_opened)


def test_241_metrics_of_a_sum_that_nobody_opened_are_not_signed(
    trying: TryingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unopened(monkeypatch, "test")
    with pytest.raises(ConsentError, match="hotel has not added up the test metrics"):
        run_merge(trying.parties.coordinator, trying)
    assert not (trying.parties.output / "model").exists()


def test_241_validation_metrics_that_nobody_added_up_are_not_signed(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one owner of four may drop out, any of them may miss a sum of metrics. So nobody objects when the test
    comes next: all take part in it, and only do not sign.
    """
    leave_unopened(monkeypatch, "validation")
    output = tmp_path / "output"
    with parties_of(one_may_drop_out(trained_folder, tmp_path / "consortium"), output, verified=True) as parties:
        (output / ".amalgram").touch()
        channel = OwnersChannel(parties.files)
        with pytest.raises(ConsentError, match="hotel has not added up the validation metrics"):
            run_merge(parties.coordinator, channel)
        assert Owner(parties.files["hotel"]).state.run.tested
    assert not (output / "model").exists()
