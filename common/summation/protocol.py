"""What every kind of sum has in common: its terms, its two sides, and the loop that drives them.

Each side is (state, inbound, randomness) -> (state, outbound), without sockets, files or clocks. `drive` is the whole
flow; the coordinator runs it over the network and `run_in_memory` over owners in this process, so that the
specification, the tests' oracle and the product are the same lines.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.identity import Identity
from common.mapped import pieces, release
from common.messages import Message, OpenSum
from common.summation import fixed_point
from common.summation.accumulator import Zeros
from common.tensor_layout import TensorLayout
from common.thresholds import Neighbourhood, neighbourhood, quorum

# (phase, message type) -> next phase. What is not in a side's table is not allowed.
Transitions = Mapping[tuple[str, type[Message]], str]
Exchange = Callable[[Mapping[str, Message]], Iterator[tuple[str, Message | None]]]
RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """What one sum is about. All but `request` a party takes from its own copy of the agreement."""

    request: OpenSum
    layout: TensorLayout
    roster: Mapping[str, bytes]  # owner -> Ed25519 public key, in the agreement's order
    needed_owners: int
    colluders: int = 0

    def __post_init__(self) -> None:
        if self.request.layout_digest != self.layout.digest():
            raise LocalProtocolError("sum: the request names another layout than the terms")

    @cached_property
    def session(self) -> bytes:
        """32 bytes that no other sum has."""
        return bytes.fromhex(self.request.session)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The roster; an owner's place on it is its number in every record."""
        return tuple(self.roster)

    @cached_property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @property
    def quorum(self) -> int:
        return quorum(len(self.roster), self.colluders)

    @property
    def neighbourhood(self) -> Neighbourhood:
        return neighbourhood(len(self.roster), self.colluders, len(self.roster) - self.needed_owners)

    def name_of(self, place: int) -> str:
        """Raises RemoteProtocolError for a place that the roster does not have."""
        if place >= len(self.names):
            raise RemoteProtocolError(f"sum: there is no owner {place} on a roster of {len(self.names)}")
        return self.names[place]


@dataclass(frozen=True, kw_only=True)
class Total:
    """The sum of the owners' vectors: all that a merge method ever sees."""

    layout: TensorLayout
    vector: NDArray[np.float64]  # (layout.size,)
    owners: tuple[str, ...]
    roster_size: int

    @property
    def num_owners(self) -> int:
        return len(self.owners)

    def rounding_error(self, name: str) -> float:
        """How far a number of tensor `name` can be from the sum of the owners' real numbers."""
        bits = fixed_point.fraction_bits(self.layout.bound(name), self.roster_size, self.layout.ring_bits)
        return float(self.num_owners * 0.5 ** (bits + 1))

    def diagonal_error(self, name: str) -> NDArray[np.float64]:
        """The same for each number on the diagonal of a symmetric tensor, (d,). Number [j, k] is off by the geometric
        mean of errors j and k at most.
        """
        return np.full(len(self[name]), self.rounding_error(name))

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        release(self.vector)  # the memory of what was read before
        return self.layout.read(self.vector, name)

    def destroy(self) -> None:
        """Overwrite the sums: with the single models known, sums of Grams can be taken apart (SECURITY.md)."""
        for piece in pieces(self.vector):
            piece[:] = np.nan


class OwnerSide(Protocol):
    """One owner in one sum. Frozen, and small enough to be written down between two messages."""

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple[Self, Message]:
        """Begin: the first answer."""

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple[Self, Message]:
        """One step; `encoded` (layout.size,) is the owner's vector in fixed point.

        On SessionOver the state must be forgotten; on any other error nothing has happened and it still stands.
        """

    @property
    def offers(self) -> bool:
        """Whether something of the vector has left, so that others could open a sum with it."""

    @property
    def reveals(self) -> bool:
        """Whether this owner has helped to open the sum."""

    @property
    def is_complete(self) -> bool:
        """Whether everything that the coordinator needs for the total has left."""

    @property
    def is_done(self) -> bool:
        """Whether the vector is no longer needed."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> Self: ...


@dataclass(frozen=True)
class Opening:
    """A session that its owners are asked to open, as a coordinator that is started again needs it."""

    state: Mapping[str, Any]
    words: NDArray[np.uint64]  # (layout.size,), in which the sum lies with its masks on (see Accumulator)


class CoordinatorSide(Protocol):
    """The coordinator in one sum."""

    def __init__(self, terms: SumTerms, participants: tuple[str, ...], zeros: Zeros = ...) -> None:
        """`zeros` makes the vector in which the sum is gathered, and then decoded."""

    def requests(self) -> Mapping[str, Message]:
        """The next message to each owner that must answer; empty when the total is ready."""

    def receive(self, owner: str, reply: Message) -> None:
        """Take one owner's answer. Raises RemoteProtocolError if it is not the one asked for."""

    def lose(self, owner: str) -> None:
        """The owner did not answer, or broke the rules; this sum goes on without it."""

    def end_step(self) -> None:
        """Every answer of this step is in, or lost. Raises TooFewOwners."""

    def total(self) -> Total:
        """The result, once `requests` is empty."""

    def opening(self) -> Opening | None:
        """What must be on the disk before the next requests leave, where owners answer them once only."""

    @classmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> Self:
        """The coordinator that had this `opening`, about to send the same requests again."""


@dataclass(frozen=True)
class SumKind:
    owner: type[OwnerSide]
    coordinator: type[CoordinatorSide]


class SessionOver(RemoteProtocolError):  # noqa: N818 - the name is the sentence
    """The coordinator broke a rule that privacy rests on: this session's secrets are to be wiped, and it is over."""


def next_phase(transitions: Transitions, phase: str, message: Message, sender: str) -> str:
    """The phase after `message`. Raises RemoteProtocolError, and then nothing has happened."""
    following = transitions.get((phase, type(message)))
    if following is None:
        raise RemoteProtocolError(f"sum: {sender} sent {type(message).__name__} in phase {phase}")
    return following


def check_enough(remaining: int, terms: SumTerms, step: str, last_heard: Mapping[str, str]) -> None:
    """Raise TooFewOwners, saying where the others were heard last, unless enough remain."""
    if remaining < terms.needed_owners:
        gone = ", ".join(f"{owner} (last heard: {where})" for owner, where in last_heard.items())
        raise TooFewOwners(
            f"{remaining} owners are left at step {step}, the agreement needs {terms.needed_owners}; "
            f"lost: {gone or 'none'}. No total was computed; bring them back and run again"
        )


def drive(side: CoordinatorSide, exchange: Exchange, exclude: Callable[[str, RemoteProtocolError], None]) -> Total:
    """Run one sum to its end. `exchange` sends requests and yields each answer as it arrives, None for a lost owner;
    `exclude` hears of owners that broke the rules and were left out for it.
    """
    while requests := side.requests():
        for owner, reply in exchange(requests):
            if reply is None:
                side.lose(owner)
                continue
            try:
                side.receive(owner, reply)
            except RemoteProtocolError as violation:
                exclude(owner, violation)
                side.lose(owner)
        side.end_step()
    return side.total()


def run_in_memory(
    kind: SumKind,
    terms: SumTerms,
    identities: Mapping[str, Identity],
    vectors: Mapping[str, NDArray[np.float64]],
    random_bytes: RandomBytes,
    lost_at: Mapping[str, int] | None = None,
) -> Total:
    """The whole protocol in one process: every owner of `terms` with its vector; `lost_at` drops owners at a step."""
    owners: dict[str, OwnerSide] = {}
    encoded = {
        name: fixed_point.encode(terms.layout, vector.copy(), len(terms.roster)) for name, vector in vectors.items()
    }
    step = -1

    def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        nonlocal step
        step += 1
        for name, request in requests.items():
            if lost_at is not None and lost_at.get(name, step + 1) <= step:
                yield name, None
            elif isinstance(request, OpenSum):
                owners[name], reply = kind.owner.open(terms, identities[name], random_bytes)
                yield name, reply
            else:
                owners[name], reply = owners[name].answer(request, encoded[name], random_bytes)
                yield name, reply

    def exclude(owner: str, violation: RemoteProtocolError) -> None:
        raise LocalProtocolError(f"sum: honest owner {owner} was found to break the rules") from violation

    return drive(kind.coordinator(terms, terms.names), exchange, exclude)
