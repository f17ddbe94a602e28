"""Three owners, each a new process for every message, and a coordinator that plays by the book until asked not to."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.owner import Owner
from common.certificates import Delivered, deliveries_digest, delivery_body
from common.domain_separation import Domain
from common.messages import (
    PROTOCOL_VERSION,
    CandidatePart,
    DeliveryPart,
    MergedStepPart,
    Message,
    MixturePart,
    OpenSum,
    Present,
    RollCall,
    ScalesPart,
)
from common.metrics import Split
from common.schedule import Delivery, Round, Schedule, schedule_of
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.protocol import SumTerms, Total
from tests.support.parties import Parties

RUN, OTHER, NONCE = "ab" * 32, "cd" * 32, "ef" * 32
PART_OF: dict[str, type[DeliveryPart]] = {"merged_step": MergedStepPart, "scales": ScalesPart}


def roll_call(parties: Parties, run: str = RUN) -> RollCall:
    return RollCall(version=PROTOCOL_VERSION, run=run, agreement_digest=parties.agreement.digest())


def opening_of(
    parties: Parties, round_: Round, number: int = 1, delivered: Sequence[Delivered] = (), run: str = RUN
) -> OpenSum:
    """The message that opens a round, as sum `number`, after `delivered` was sent."""
    return OpenSum(
        run=run,
        agreement_digest=parties.agreement.digest(),
        round=number,
        nonce=NONCE,
        position=round_.position,
        deliveries_digest=deliveries_digest(delivered),
        layout_digest=round_.layout.digest(),
    )


def part_of(
    parties: Parties, delivery: Delivery, vector: NDArray | None = None, model: str | None = None, run: str = RUN
) -> DeliveryPart:
    """The one part of a delivery; without a vector, of zeros: a model without any change."""
    payload = np.zeros(delivery.layout.size, dtype=np.float32) if vector is None else vector
    has_name = delivery.kind in ("candidate", "mixture")
    name = (delivery.names[0] if model is None else model) if has_name else ""
    delivered = Delivered(position=delivery.position, model=name, digest=digest_of(payload))
    common = {
        "run": run,
        "agreement_digest": parties.agreement.digest(),
        "position": delivery.position,
        "part": 0,
        "parts": 1,
        "payload": payload,
        "signature": signed_delivery(parties, delivered, run),
    }
    if has_name:
        named = CandidatePart if delivery.kind == "candidate" else MixturePart
        return named(**common, model=name)  # type: ignore[arg-type]
    return PART_OF[delivery.kind](**common)  # type: ignore[arg-type]


def delivered_by(part: DeliveryPart) -> Delivered:
    """What an owner notes of a delivery that came in one part."""
    model = part.model if isinstance(part, CandidatePart | MixturePart) else ""
    return Delivered(position=part.position, model=model, digest=digest_of(part.payload))


def digest_of(vector: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector).data).hexdigest()


def signed_delivery(parties: Parties, delivered: Delivered, run: str = RUN) -> bytes:
    """The coordinator's signature under something that it sends."""
    body = delivery_body(parties.agreement.digest(), delivered)
    return parties.identities["coordinator"].sign(Domain.SIGN_DELIVERY, bytes.fromhex(run), body)


def fast_forward(owner: Owner, position: int) -> None:
    """Let the owner think that everything before `position` of its schedule is over, whatever it was sent."""
    owner.state.update_run(begun=position - 1 if position > 0 else None, is_complete=True)


class Process:
    """The example's owners; each message goes to an owner that is built anew."""

    def __init__(self, parties: Parties) -> None:
        self.parties = parties
        self.schedule: Schedule = schedule_of(parties.agreement, parties.plan)
        self.side: MaskedCoordinator
        self.roll_call()

    def send(self, owner: str, message: Message) -> Message:
        return Owner(self.parties.files[owner]).answer(message)

    def send_all(self, message: Message) -> None:
        for owner in self.parties.files:
            self.send(owner, message)

    def roll_call(self, run: str = RUN) -> dict[str, Present]:
        request = roll_call(self.parties, run)
        return {owner: self.send(owner, request) for owner in self.parties.files}  # type: ignore[misc]

    def fast_forward(self, position: int) -> None:
        for path in self.parties.files.values():
            fast_forward(Owner(path), position)

    def open_sum(self, number: int, round_: Round | None = None, delivered: Sequence[Delivered] = ()) -> OpenSum:
        """By default of the contributions."""
        return opening_of(self.parties, round_ or self.schedule.find("contribution"), number, delivered)

    def candidate_slot(self, method: str = "average", split: Split = "test") -> Delivery:
        return self.schedule.deliveries("candidate", method=method, split=split)[0]

    def begin(self, request: OpenSum) -> None:
        agreement = self.parties.agreement
        self.terms = SumTerms(
            request=request,
            layout=self.schedule.round_at(request.position).layout,
            roster=agreement.roster,
            needed_owners=agreement.needed_owners,
        )
        self.side = MaskedCoordinator(self.terms, self.terms.names)

    def until(self, kind: type[Message] | None) -> Mapping[str, Message]:
        while requests := self.side.requests():
            if kind is not None and isinstance(next(iter(requests.values())), kind):
                break
            for owner, request in requests.items():
                self.side.receive(owner, self.send(owner, request))
            self.side.end_step()
        return requests

    def sum(self, request: OpenSum) -> Total:
        self.begin(request)
        self.until(None)
        return self.side.total()

    def deliver_candidates(self, split: Split) -> list[Delivered]:
        """Send everybody a model without any change for every candidate of a split."""
        slots = [each for each in self.schedule.events if isinstance(each, Delivery) and each.split == split]
        self.fast_forward(slots[0].position)
        parts = [part_of(self.parties, slot) for slot in slots]
        for part in parts:
            self.send_all(part)
        return [delivered_by(part) for part in parts]
