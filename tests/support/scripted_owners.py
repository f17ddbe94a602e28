"""A coordinator of owners that follow a script, over a channel that may lose or replace their answers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_bytes

import numpy as np

from common.agreement import Agreement
from common.certificates import body_of, presence_body, sign_burned
from common.domain_separation import Domain
from common.identity import Identity
from common.messages import (
    BurnCertificate,
    BurnSession,
    CertificateKept,
    DeliveryPart,
    Finish,
    Finished,
    Message,
    OpenSum,
    Packet,
    PartReceived,
    Present,
    Receipts,
    ReceiptsKept,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
    SharesOpened,
    SharesSealed,
)
from common.publication import Publication
from common.schedule import Delivery, Round, Schedule
from common.summation import SUMMATIONS, fixed_point
from common.summation.masked.book import shares_body
from common.summation.masked.owner import MaskedOwner
from common.summation.protocol import OwnerSide, SumTerms
from common.summation.records import SealedShare
from common.tensor_layout import TensorEntry, TensorLayout
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from tests.support.parties import IDENTITIES

LAYOUT = TensorLayout((TensorEntry(name="t", shape=(7,), bound=8.0),))
ROUND = Round(position=0, kind="contribution", layout=LAYOUT)
DELIVERY = Delivery(
    position=1, kind="candidate", layout=LAYOUT, method="average", split="test", names=("average", "regmean@0.9")
)
TEST_ROUND = Round(position=2, kind="metrics", layout=LAYOUT, split="test", models=("base", "average"))
SCHEDULE = Schedule((ROUND, DELIVERY, TEST_ROUND))
MODEL = "cd" * 32
PUBLICATION = Publication(
    files={"config.json": MODEL}, configuration={}, owners=("ada",), examples=None, test={}, validation={}, mixtures={}
)
Fault = Callable[[str, Message, Message], Message | None]


def present(
    request: RollCall, owner: str, identity: Identity | None = None, *, next_round: int = 0, pending: str = ""
) -> Present:
    """An owner's answer to the roll call."""
    body = presence_body(request.agreement_digest, next_round, pending)
    signature = (identity or IDENTITIES[owner]).sign(Domain.SIGN_PRESENT, bytes.fromhex(request.run), body)
    return Present(run=request.run, owner=owner, next_round=next_round, pending=pending, signature=signature)


class ScriptedChannel:
    """Nodes 10, 11, ... are honest owners, each with a vector of threes. A fault may replace their answers."""

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
            return present(request, owner, identity)
        if isinstance(request, DeliveryPart):
            return PartReceived(run=request.run, owner=owner, position=request.position, part=request.part)
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
            signature = sign_burned(identity, self.agreement.digest(), request.session)
            return SessionBurned(session=request.session, owner=owner, signature=signature)
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


def coordinator_of(
    agreement: Agreement,
    fault: Fault,
    needed: int,
    owners: tuple[str, ...] = ("ada", "bea", "cyd"),
    kind: str = "masked",
) -> Coordinator:
    """A coordinator of scripted owners; its checkpoint lies in the working directory."""
    summation = agreement.summation.model_copy(update={"kind": kind})
    agreement = agreement.model_copy(update={"min_owners": needed, "summation": summation})
    channel = ScriptedChannel(agreement, owners, fault)
    return Coordinator(
        channel=channel,
        agreement=agreement,
        identity=IDENTITIES["coordinator"],
        checkpoint=Checkpoint.open(Path("checkpoint"), agreement.digest()),
        schedule=SCHEDULE,
    )


def honest(owner: str, request: Message, reply: Message) -> Message:
    """No fault."""
    return reply


def run_all(coordinator: Coordinator) -> np.ndarray:
    coordinator.roll_call()
    total = coordinator.sum(ROUND)
    coordinator.deliver(DELIVERY, np.zeros(7, dtype=np.float32), "average")
    coordinator.sum(TEST_ROUND)
    coordinator.confirm_result("average", MODEL, PUBLICATION.canonical_bytes())
    return total.vector


class WrongDealer:
    """bea seals what ada cannot use, signs it, and opens it as `opens` says. The owners certify what is over."""

    def __init__(self, opens: Callable[[SharesOpened], Message | None]) -> None:
        self.opens = opens
        self.coordinator: Coordinator
        self.sessions: set[str] = set()

    def __call__(self, owner: str, request: Message, reply: Message) -> Message | None:
        if isinstance(request, BurnSession):
            digest = self.coordinator.agreement.digest()
            signature = sign_burned(IDENTITIES[owner], digest, request.session)
            return SessionBurned(session=request.session, owner=owner, signature=signature)
        if isinstance(request, OpenSum):
            self.sessions.add(request.session)
        if owner == "bea" and isinstance(reply, SharesSealed):
            return self._sealed_wrong(reply)
        if owner == "bea" and isinstance(reply, SharesOpened):
            return self.opens(reply)
        return reply

    def _sealed_wrong(self, reply: SharesSealed) -> SharesSealed:
        channel = self.coordinator.channel
        assert isinstance(channel, ScriptedChannel)
        side = channel.sides["bea"]
        assert isinstance(side, MaskedOwner)
        first, *others = SealedShare.unpack_all(reply.shares)
        shares = [replace(first, sealed=bytes(84)), *others]
        body = shares_body(side.book, reply.commitment, b"".join(share.digest for share in shares))
        signature = IDENTITIES["bea"].sign(Domain.SIGN_SHARES, side.terms.session, body)
        return replace(reply, shares=SealedShare.pack_all(shares), signature=signature)

    def started(self, agreement: Agreement, needed: int) -> Coordinator:
        self.coordinator = coordinator_of(agreement, self, needed)
        return self.coordinator
