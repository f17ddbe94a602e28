"""The plain sum: every owner sends its vector as it is, in parts.

Run by owner and coordinator. It protects nothing: the coordinator sees each owner's vector. It is for parties that
trust the coordinator with that, for simulations, and as the oracle of the masked sum.

    open    coordinator: OpenSum       owner: SumOpened
    part k  coordinator: PartRequest   owner: VectorPart     k = 0, 1, ...; folded into one accumulator as it arrives

An owner lost before its first part is left out; one lost later breaks the session, since some of it is already in.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError
from common.messages import Message, OpenSum, PartRequest, SumOpened, VectorPart
from common.summation.protocol import SessionBroken, SumTerms, Total, Transitions, check_enough, next_phase
from common.tensor_layout import TensorLayout

OPEN, UPLOADING, DONE = "open", "uploading", "done"
BYTES_PER_NUMBER = 8

# What each side may receive, and where it leads. An owner is born in OPEN by answering OpenSum.
OWNER_TRANSITIONS: Transitions = {
    (OPEN, PartRequest): UPLOADING,
    (UPLOADING, PartRequest): UPLOADING,
}
COORDINATOR_TRANSITIONS: Transitions = {
    (OPEN, SumOpened): OPEN,
    (UPLOADING, VectorPart): UPLOADING,
}


@dataclass(frozen=True, kw_only=True)
class PlainOwner:
    """One owner in one plain sum."""

    session: str
    owner: str
    layout: TensorLayout
    phase: str = OPEN
    next_part: int = 0

    @classmethod
    def open(cls, request: OpenSum, owner: str, layout: TensorLayout) -> tuple["PlainOwner", Message]:
        return cls(session=request.session, owner=owner, layout=layout), SumOpened(session=request.session, owner=owner)

    def answer(self, request: Message, vector: NDArray) -> tuple["PlainOwner", Message]:
        phase = next_phase(OWNER_TRANSITIONS, self.phase, request, "coordinator")
        assert isinstance(request, PartRequest)  # the table lets nothing else through
        if request.session != self.session:
            raise RemoteProtocolError("sum: coordinator asked for a part of another session")
        if request.part != self.next_part:
            raise RemoteProtocolError(f"sum: coordinator asked for part {request.part}, part {self.next_part} is next")
        slices = self.layout.part_slices(BYTES_PER_NUMBER)
        values = np.ascontiguousarray(vector[slices[request.part]], dtype="<f8")
        reply = VectorPart(session=self.session, owner=self.owner, part=request.part, payload=values)
        if request.part + 1 == len(slices):
            phase = DONE
        return replace(self, phase=phase, next_part=request.part + 1), reply

    @property
    def is_done(self) -> bool:
        return self.phase == DONE

    def to_json(self) -> dict[str, Any]:
        state = asdict(self)
        del state["layout"]
        return state

    @classmethod
    def from_json(cls, state: dict[str, Any], layout: TensorLayout) -> "PlainOwner":
        return cls(layout=layout, **state)


class PlainCoordinator:
    """The coordinator in one plain sum: one accumulator, and one part in hand."""

    def __init__(self, terms: SumTerms) -> None:
        check_enough(terms.participants, terms.needed_owners, "open")
        self._terms = terms
        self._participants = terms.participants
        self._phase = OPEN
        self._part = 0
        self._slices = terms.layout.part_slices(BYTES_PER_NUMBER)
        self._accumulator = np.zeros(terms.layout.size)
        self._waiting: set[str] = set()

    def requests(self) -> Mapping[str, Message]:
        if self._phase == DONE:
            return {}
        self._waiting = set(self._participants)
        if self._phase == OPEN:
            return dict.fromkeys(self._participants, self._terms.request)
        request = PartRequest(session=self._terms.request.session, part=self._part)
        return dict.fromkeys(self._participants, request)

    def receive(self, owner: str, reply: Message) -> None:
        next_phase(COORDINATOR_TRANSITIONS, self._phase, reply, f"owner {owner}")
        assert isinstance(reply, (SumOpened, VectorPart))  # the table lets nothing else through
        if owner not in self._waiting:
            raise RemoteProtocolError(f"sum: owner {owner} answered twice, or was not asked")
        if reply.owner != owner or reply.session != self._terms.request.session:
            raise RemoteProtocolError(f"sum: owner {owner} answered for another owner or session")
        if isinstance(reply, VectorPart):
            self._fold(owner, reply)
        self._waiting.remove(owner)

    def _fold(self, owner: str, reply: VectorPart) -> None:
        position = self._slices[self._part]
        expected = position.stop - position.start
        if reply.part != self._part or reply.payload.shape != (expected,) or reply.payload.dtype != np.dtype("<f8"):
            raise RemoteProtocolError(
                f"sum: owner {owner} sent {reply.payload.size} numbers of {reply.payload.dtype} as part {reply.part}; "
                f"part {self._part} has {expected} of float64"
            )
        if not np.isfinite(reply.payload).all():
            raise RemoteProtocolError(f"sum: owner {owner} sent a number that is not finite in part {reply.part}")
        self._accumulator[position] += reply.payload

    def lose(self, owner: str) -> None:
        if self._phase != OPEN:
            raise SessionBroken(owner)
        self._participants = tuple(name for name in self._participants if name != owner)
        self._waiting.discard(owner)

    def end_step(self) -> None:
        if self._waiting:
            raise LocalProtocolError(f"sum: step ended while waiting for {', '.join(sorted(self._waiting))}")
        check_enough(self._participants, self._terms.needed_owners, f"{self._phase} {self._part}")
        if self._phase == OPEN:
            self._phase = UPLOADING
        else:
            self._part += 1
            if self._part == len(self._slices):
                self._phase = DONE

    def total(self) -> Total:
        if self._phase != DONE:
            raise LocalProtocolError(f"sum: the total was asked for in phase {self._phase}")
        return Total(layout=self._terms.layout, vector=self._accumulator, owners=self._participants)
