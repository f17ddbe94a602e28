"""The plain sum: every owner sends its vector as it is, in parts.

Run by owner and coordinator. It protects nothing: the coordinator sees each owner's vector. It is for parties that
trust the coordinator with that, and it is the oracle of the masked sum: both add the same integers.

    open    coordinator: OpenSum       owner: SumOpened
    part k  coordinator: PartRequest   owner: VectorPart     k = 0, 1, ...; folded into one accumulator as it arrives
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError
from common.identity import Identity
from common.messages import Message, PartRequest, SumOpened, VectorPart
from common.summation import fixed_point
from common.summation.accumulator import Accumulator, Zeros, zeros_in_memory
from common.summation.protocol import Opening, RandomBytes, SumTerms, Total, Transitions, check_enough, next_phase

OPEN, UPLOADING, DONE = "open", "uploading", "done"

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

    terms: SumTerms
    owner: str
    phase: str = OPEN
    is_complete: bool = False

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple["PlainOwner", Message]:
        state = cls(terms=terms, owner=identity.name)
        return state, SumOpened(session=terms.request.session, owner=identity.name)

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple["PlainOwner", Message]:
        phase = next_phase(OWNER_TRANSITIONS, self.phase, request, "coordinator")
        assert isinstance(request, PartRequest)  # the table lets nothing else through
        if request.session != self.terms.request.session:
            raise RemoteProtocolError("sum: coordinator asked for a part of another session")
        slices = self.terms.layout.part_slices(self.terms.layout.dtype.itemsize)
        if request.part >= len(slices):
            raise RemoteProtocolError(f"sum: coordinator asked for part {request.part} of {len(slices)}")
        payload = np.ascontiguousarray(encoded[slices[request.part]])
        reply = VectorPart(session=request.session, owner=self.owner, part=request.part, payload=payload)
        whole = self.is_complete or request.part + 1 == len(slices)
        return replace(self, phase=phase, is_complete=whole), reply

    @property
    def offers(self) -> bool:
        return False  # the coordinator sees the vector itself: to give it again tells it nothing more

    @property
    def reveals(self) -> bool:
        return False

    @property
    def is_done(self) -> bool:
        return False  # any part may be asked for again, so the vector stays until the next sum or the end of the run

    def to_json(self) -> dict[str, Any]:
        return {"phase": self.phase, "is_complete": self.is_complete}

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> "PlainOwner":
        return cls(terms=terms, owner=identity.name, phase=state["phase"], is_complete=state["is_complete"])


class PlainCoordinator:
    """The coordinator in one plain sum: one accumulator, and one part in hand."""

    def __init__(self, terms: SumTerms, participants: tuple[str, ...], zeros: Zeros = zeros_in_memory) -> None:
        check_enough(len(participants), terms, "open", {})
        self._terms = terms
        self._participants = participants
        self._phase = OPEN
        self._accumulator = Accumulator(terms.layout, zeros)
        self._waiting: set[str] = set()
        self._last_heard: dict[str, str] = {}

    def requests(self) -> Mapping[str, Message]:
        if self._phase == DONE:
            return {}
        self._waiting = set(self._participants)
        if self._phase == OPEN:
            return dict.fromkeys(self._participants, self._terms.request)
        request = PartRequest(session=self._terms.request.session, part=self._accumulator.part)
        return dict.fromkeys(self._participants, request)

    def receive(self, owner: str, reply: Message) -> None:
        next_phase(COORDINATOR_TRANSITIONS, self._phase, reply, f"owner {owner}")
        assert isinstance(reply, (SumOpened, VectorPart))  # the table lets nothing else through
        if owner not in self._waiting:
            raise RemoteProtocolError(f"sum: owner {owner} answered twice, or was not asked")
        if reply.owner != owner or reply.session != self._terms.request.session:
            raise RemoteProtocolError(f"sum: owner {owner} answered for another owner or session")
        if isinstance(reply, VectorPart):
            self._accumulator.fold(owner, reply.part, reply.payload)
        self._waiting.remove(owner)

    def lose(self, owner: str) -> None:
        self._participants = tuple(name for name in self._participants if name != owner)
        self._waiting.discard(owner)
        self._last_heard[owner] = f"before {self._step}"
        self._accumulator.lose_owner()

    def end_step(self) -> None:
        if self._waiting:
            raise LocalProtocolError(f"sum: step ended while waiting for {', '.join(sorted(self._waiting))}")
        check_enough(len(self._participants), self._terms, self._step, self._last_heard)
        if self._phase == OPEN:
            self._phase = UPLOADING
        elif not self._accumulator.advance():
            self._phase = DONE

    @property
    def _step(self) -> str:
        return "open" if self._phase == OPEN else f"part {self._accumulator.part}"

    def total(self) -> Total:
        if self._phase != DONE:
            raise LocalProtocolError(f"sum: the total was asked for in phase {self._phase}")
        vector = fixed_point.decode(
            self._terms.layout, self._accumulator.words, len(self._terms.roster), len(self._participants)
        )
        return Total(
            layout=self._terms.layout, vector=vector, owners=self._participants, roster_size=len(self._terms.roster)
        )

    def opening(self) -> Opening | None:
        return None  # owners give the same vector into as many plain sums as they are asked to

    @classmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> "PlainCoordinator":
        raise LocalProtocolError("sum: a plain sum is opened anew, never again")
