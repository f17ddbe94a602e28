"""The plain sum: every owner sends its vector unprotected, in parts.

Owners and coordinator both run it. It protects nothing: the coordinator sees each owner's vector. It is for parties
that trust the coordinator with that, and it is the oracle of the masked sum, because both add the same integers.

    phase     coordinator    owner
    open      OpenSum        SumOpened
    upload    PartRequest    VectorPart     once for each part, which is added to the sum as it arrives
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from common import saved_state
from common.errors import LocalProtocolError, RemoteProtocolError
from common.identity import Identity
from common.messages import Message, PartRequest, SumOpened, VectorPart
from common.saved_state import SavedState
from common.summation import fixed_point
from common.summation.protocol import (
    DONE,
    CoordinatorSide,
    CoordinatorStep,
    Inputs,
    Opening,
    SumTerms,
    Transition,
    Transitions,
    find_transition,
)
from common.summation.secret_sharing import RandomBytes


class Phase(StrEnum):
    OPEN = "open"
    UPLOAD = "upload"
    UPLOADED = "uploaded"  # an owner's only: its last part has left


@dataclass(frozen=True, kw_only=True)
class SavedPlainOwner(SavedState):
    """What an owner saves between two messages."""

    version: Literal[1] = 1
    phase: Phase = Phase.OPEN


@dataclass(frozen=True, kw_only=True)
class PlainOwner(SavedPlainOwner):
    """One owner in one plain sum. OWNER_TRANSITIONS says what it answers in which phase."""

    terms: SumTerms
    name: str

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple[Self, Message]:
        side = cls(terms=terms, name=identity.name)
        return side, SumOpened(session=terms.request.session, owner=identity.name)

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple[Self, Message]:
        transition = find_transition(OWNER_TRANSITIONS, self.phase, request, self.terms)
        return transition.follow(self, request, Inputs(encoded, random_bytes))

    def _give_part(self, request: PartRequest, inputs: Inputs) -> tuple[Self, Message]:
        slices = self.terms.part_slices
        if request.part >= len(slices):
            raise RemoteProtocolError(f"sum: coordinator asked for part {request.part} of {len(slices)}")
        payload = np.ascontiguousarray(inputs.encoded[slices[request.part]])
        return self, VectorPart(session=request.session, owner=self.name, part=request.part, payload=payload)

    @property
    def offers(self) -> bool:
        return False  # the coordinator sees the vector itself, so giving it again reveals nothing more

    @property
    def reveals(self) -> bool:
        return False

    @property
    def is_complete(self) -> bool:
        return self.phase == Phase.UPLOADED

    @property
    def is_done(self) -> bool:
        return False  # any part may be asked for again, so the vector stays until the next sum or the run's end

    def to_json(self) -> dict[str, Any]:
        return saved_state.to_json(SavedPlainOwner, self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> Self:
        return cls(terms=terms, name=identity.name, **vars(saved_state.from_json(SavedPlainOwner, state)))


# An owner enters OPEN by answering OpenSum.
OWNER_TRANSITIONS: Transitions = {
    (Phase.OPEN, PartRequest): Transition(PlainOwner._give_part, Phase.UPLOAD, after_last_part=Phase.UPLOADED),
    (Phase.UPLOAD, PartRequest): Transition(PlainOwner._give_part, Phase.UPLOAD, after_last_part=Phase.UPLOADED),
    (Phase.UPLOADED, PartRequest): Transition(PlainOwner._give_part, Phase.UPLOADED),
}


class PlainCoordinator(CoordinatorSide):
    """The coordinator in one plain sum: one accumulator, and one part at a time."""

    @property
    def _steps(self) -> Mapping[str, CoordinatorStep]:
        return COORDINATOR_STEPS

    def _open(self, index: int) -> Message:
        return self._terms.request

    def _request_part(self, index: int) -> Message:
        return PartRequest(session=self._terms.request.session, part=self._accumulator.part)

    def _take_opened(self, index: int, reply: SumOpened) -> None:
        """Nothing to keep: the owner is ready."""

    def _fold(self, index: int, reply: VectorPart) -> None:
        terms, accumulator = self._terms, self._accumulator
        accumulator.check(reply.owner, reply.part, reply.payload)
        position = accumulator.slices[accumulator.part]
        fixed_point.check_one(terms.layout, position, reply.payload, reply.owner, len(terms.roster))
        accumulator.fold(reply.owner, reply.part, reply.payload)

    def _end_part(self) -> str | None:
        return Phase.UPLOAD if self._accumulator.advance() else None

    def _summed_owners(self) -> tuple[str, ...]:
        return tuple(name for name in self._terms.names if name in self._remaining)

    def opening(self) -> Opening | None:
        return None  # owners give the same vector to as many plain sums as they are asked to

    @classmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> Self:
        raise LocalProtocolError("sum: a plain sum cannot be opened again; a new one starts instead")


COORDINATOR_STEPS: Mapping[str, CoordinatorStep] = {
    Phase.OPEN: CoordinatorStep(
        request=PlainCoordinator._open,
        expects=(SumOpened,),
        handle=PlainCoordinator._take_opened,
        next_phase=Phase.UPLOAD,
    ),
    Phase.UPLOAD: CoordinatorStep(
        request=PlainCoordinator._request_part,
        expects=(VectorPart,),
        handle=PlainCoordinator._fold,
        end=PlainCoordinator._end_part,
        next_phase=DONE,
        in_parts=True,
    ),
}
