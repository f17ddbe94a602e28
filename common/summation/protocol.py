"""What every kind of sum has in common: its terms, its two sides, and the loop that drives them.

Each side is (state, inbound, randomness) -> (state, outbound), without sockets, files or clocks. One table a side says
what may arrive in which phase, who handles it, and which phase follows. `drive` is the whole flow. The coordinator runs
it over the network, and `run_in_memory` over owners in this process, so the specification, the tests' oracle and the
product are the same lines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.identity import Identity
from common.mapped import release
from common.messages import MaskedPart, Message, OpenSum, SharesDisputed, UploadsOpened, VectorPart
from common.saved_state import SavedState
from common.summation import fixed_point
from common.summation.accumulator import Accumulator, Zeros, zeros_in_memory
from common.summation.records import name_at
from common.summation.secret_sharing import RandomBytes
from common.tensor_layout import TensorLayout
from common.text import some_of
from common.thresholds import Neighbourhood, neighbourhood, quorum

DONE = "done"  # the coordinator's last phase, in every kind of sum: the total is ready
Exchange = Callable[[Mapping[str, Message]], Iterator[tuple[str, Message | None]]]


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """What one sum is about. A party takes all of it but `request` from its own copy of the agreement.

    `is_open`: every owner adds up the total by itself (masked/opening.py). `all_must_sign`: every owner in the total
    must know who is in it, because all of them verify together what becomes of it.
    """

    request: OpenSum
    layout: TensorLayout
    roster: Mapping[str, bytes]  # owner -> Ed25519 public key, in the agreement's order
    needed_owners: int
    colluders: int = 0
    is_open: bool = False
    all_must_sign: bool = False

    def __post_init__(self) -> None:
        if self.request.layout_digest != self.layout.digest():
            raise LocalProtocolError("sum: the request names a different layout than the terms")

    @cached_property
    def session(self) -> bytes:
        """32 bytes that no other sum has."""
        return bytes.fromhex(self.request.session)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The roster. An owner's position on it is its owner index, which stands for it in every record."""
        return tuple(self.roster)

    @cached_property
    def indices(self) -> dict[str, int]:
        """Name -> owner index."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def quorum(self) -> int:
        return quorum(len(self.roster), self.colluders)

    @property
    def most_liars(self) -> int:
        """How many owners may lie together, or one, if the agreement expects none."""
        return max(1, self.colluders)

    @property
    def neighbourhood(self) -> Neighbourhood:
        return neighbourhood(len(self.roster), self.colluders, len(self.roster) - self.needed_owners)

    @property
    def part_slices(self) -> list[slice]:
        """Where a vector in fixed point is cut into parts for the wire."""
        return self.layout.part_slices(self.layout.dtype.itemsize)

    def name_of(self, index: int) -> str:
        """The name at an owner index. Raises RemoteProtocolError if the roster is shorter."""
        return name_at(self.names, index)


@dataclass(kw_only=True)
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
        """The rounding error of each number on the diagonal of a symmetric tensor, (d,). The error of number [j, k] is
        at most the geometric mean of errors j and k.
        """
        return np.full(self.layout.shape(name)[0], self.rounding_error(name))

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        release(self.vector)  # frees the memory of tensors that were read before
        return self.layout.read(self.vector, name)

    def some_of(self, name: str, numbers: slice) -> NDArray[np.float64]:
        release(self.vector)
        return self.layout.read(self.vector, name).reshape(-1)[numbers]

    def destroy(self) -> None:
        """Overwrite the sums. With the individual models known, sums of Grams can be taken apart (SECURITY.md).

        A total that is mapped from a checkpoint is only let go of: its file stays until the run ends, because it may
        have to be resumed from it.
        """
        if isinstance(self.vector, np.memmap):
            self.vector = np.broadcast_to(np.nan, self.vector.shape)
        else:
            self.vector.fill(np.nan)


# --- an owner's side ---


class SessionOver(RemoteProtocolError):  # noqa: N818 - the name is the sentence
    """The coordinator broke a rule that privacy rests on. This session is over, and its secrets must be wiped."""


class SumAbandoned(RemoteProtocolError):  # noqa: N818 - the name is the sentence
    """The coordinator gives a session up before the owners open it. Another can be opened without those who lied."""


@dataclass(frozen=True)
class Inputs:
    """What an owner needs for an answer beside its state: its vector in fixed point, (layout.size,), and randomness."""

    encoded: NDArray
    random_bytes: RandomBytes


@dataclass(frozen=True)
class Transition:
    """One row of an owner's table. `handle(side, request, inputs)` returns the changed side and the reply."""

    handle: Callable[[Any, Any, Inputs], tuple[Any, Message]]
    next_phase: str
    after_last_part: str | None = None  # the next phase once the reply is the vector's last part
    after_dispute: str | None = None  # the next phase once the reply disputes shares

    def follow(self, side: Any, request: Message, inputs: Inputs) -> tuple[Any, Message]:
        """Handle the request and enter the next phase."""
        state, reply = self.handle(side, request, inputs)
        next_phase = self.next_phase
        if self.after_last_part is not None and isinstance(reply, (MaskedPart, VectorPart)):
            is_last = reply.part == len(side.terms.part_slices) - 1
            next_phase = self.after_last_part if is_last else next_phase
        if self.after_dispute is not None and isinstance(reply, SharesDisputed):
            next_phase = self.after_dispute
        return replace(state, phase=next_phase), reply


# What an owner may receive: (its phase, the type of the request) -> what follows. Everything else is refused.
Transitions = Mapping[tuple[str, type[Message]], Transition]


def find_transition(transitions: Transitions, phase: str, request: Message, terms: SumTerms) -> Transition:
    """The row for this request. Raises RemoteProtocolError if there is none; then nothing has happened."""
    transition = transitions.get((phase, type(request)))
    if transition is None:
        raise RemoteProtocolError(f"sum: coordinator sent {type(request).__name__} in phase {phase}")
    if getattr(request, "session", None) != terms.request.session:
        raise RemoteProtocolError(f"sum: coordinator sent {type(request).__name__} for another session")
    return transition


class OwnerSide(Protocol):
    """One owner in one sum. Frozen, and small enough to be saved between two messages."""

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple[Self, Message]:
        """Begin: the answer to OpenSum."""

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple[Self, Message]:
        """Answer one request; `encoded` (layout.size,) is the owner's vector in fixed point.

        On SessionOver the state must be forgotten. On any other error nothing has happened, and the state is unchanged.
        """

    @property
    def offers(self) -> bool:
        """Whether a part of the vector has left, so that others could open a sum with it."""

    @property
    def reveals(self) -> bool:
        """Whether this owner has helped to open the sum."""

    @property
    def is_complete(self) -> bool:
        """Whether everything that the coordinator needs from this owner for the total has left."""

    @property
    def is_done(self) -> bool:
        """Whether the vector is no longer needed."""

    def to_json(self) -> dict[str, Any]:
        """The state to save between two messages."""

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> Self:
        """The side that was saved. Raises LocalProtocolError if this version would not have saved it like this."""


# --- the coordinator's side ---


@dataclass(frozen=True, kw_only=True)
class SavedOpening(SavedState):
    """What a coordinator needs to open a session after a restart, except the masked sum itself."""

    version: Literal[3] = 3
    remaining: tuple[str, ...]  # the owners that are asked to open it
    book: bytes  # KeyEntry.pack_all
    commitments: Mapping[int, bytes]  # owner index -> commitment to its self-mask seed
    dealt: Mapping[int, Mapping[int, bytes]]  # dealer -> recipient -> commitment to the share that it is to reveal
    sealed: Mapping[int, bytes]  # dealer -> SealedShare.pack_all
    sealed_signatures: Mapping[int, bytes]  # dealer -> its signature under them
    survivors: bytes  # Survivor.pack_all
    signatures: Mapping[int, bytes]  # owner index -> signature over `survivors`
    uploads: Mapping[int, bytes] = field(
        default_factory=dict
    )  # owner index -> its masked vector, in a sum that is open to all owners


@dataclass(frozen=True)
class Opening:
    """A session that its owners are asked to open, as a coordinator that restarts needs it."""

    state: SavedOpening
    words: NDArray[np.uint64]  # (layout.size,): the sum, still masked (see Accumulator)


@dataclass(frozen=True)
class CoordinatorStep:
    """One row of the coordinator's table: what it sends in a phase, what it expects back, and what follows.

    `request(side, owner_index)` builds the request to one owner, None for one that is not asked. `handle(side,
    owner_index, reply)` takes one reply, or raises RemoteProtocolError and changes nothing. `end(side)` runs once every
    reply is in; it returns the phase that follows, None for `next_phase`.
    """

    request: Callable[[Any, int], Message | None]
    expects: tuple[type[Message], ...]
    handle: Callable[[Any, int, Any], None]
    next_phase: str
    end: Callable[[Any], str | None] = lambda side: None
    in_parts: bool = False  # the phase repeats for each part of the vectors


class CoordinatorSide(ABC):
    """The coordinator in one sum. A kind of sum adds its table, whose first row is the first phase."""

    def __init__(self, terms: SumTerms, participants: tuple[str, ...], zeros: Zeros = zeros_in_memory) -> None:
        """`zeros` makes the vector in which the sum is gathered, and then decoded."""
        self._phase = next(iter(self._steps))
        check_enough(len(participants), terms, self._phase, {})
        self._terms = terms
        self._remaining = set(participants)
        self._waiting: set[str] = set()
        self._last_heard: dict[str, str] = {}
        self._accumulator = Accumulator(terms.layout, zeros)
        self.violations: dict[str, RemoteProtocolError] = {}  # owners that lied, though the sum did not need the truth

    @property
    @abstractmethod
    def _steps(self) -> Mapping[str, CoordinatorStep]:
        """Phase -> its row."""

    @abstractmethod
    def _summed_owners(self) -> tuple[str, ...]:
        """The owners whose vectors are in the total, in the roster's order."""

    def requests(self) -> Mapping[str, Message]:
        """The next request to each owner that must answer; empty when the total is ready."""
        if self._phase == DONE:
            return {}
        in_order = [name for name in self._terms.names if name in self._remaining]
        request = self._steps[self._phase].request
        asked = {name: request(self, self._terms.indices[name]) for name in in_order}
        requests = {name: message for name, message in asked.items() if message is not None}
        self._waiting = set(requests)
        return requests

    def receive(self, owner: str, reply: Message) -> None:
        """Take one owner's answer. Raises RemoteProtocolError if it is not the one asked for; then nothing changes."""
        step = self._steps.get(self._phase)
        if step is None or type(reply) not in step.expects:
            raise RemoteProtocolError(f"sum: owner {owner} sent {type(reply).__name__} in phase {self._phase}")
        if owner not in self._waiting:  # check: one-answer-a-step
            raise RemoteProtocolError(f"sum: owner {owner} answered twice, or was not asked")
        fields = vars(reply)
        if (fields["owner"], fields["session"]) != (owner, self._terms.request.session):
            raise RemoteProtocolError(f"sum: owner {owner} answered for another owner or session")
        step.handle(self, self._terms.indices[owner], reply)
        self._waiting.remove(owner)
        self._last_heard[owner] = self._step_name

    def drop(self, owner: str) -> None:
        """Continue without an owner that did not answer, or broke the rules."""
        self._remaining.discard(owner)
        self._waiting.discard(owner)
        self._accumulator.drop_owner()

    def end_step(self) -> None:
        """Go on once every owner has answered or dropped out. Raises TooFewOwners."""
        if self._waiting:
            raise LocalProtocolError(f"sum: the step ended while waiting for {', '.join(sorted(self._waiting))}")
        dropped = [name for name in self._terms.names if name not in self._remaining]
        heard = {name: self._last_heard.get(name, "never") for name in dropped}
        check_enough(len(self._remaining), self._terms, self._step_name, heard)
        step = self._steps[self._phase]
        self._phase = step.end(self) or step.next_phase

    def total(self) -> Total:
        """The result, once `requests` is empty."""
        if self._phase != DONE:
            raise LocalProtocolError(f"sum: the total was requested in phase {self._phase}")
        owners, roster_size = self._summed_owners(), len(self._terms.roster)
        vector = fixed_point.decode(self._terms.layout, self._accumulator.words, roster_size, len(owners))
        return Total(layout=self._terms.layout, vector=vector, owners=owners, roster_size=roster_size)

    @abstractmethod
    def opening(self) -> Opening | None:
        """What must be on the disk before the next requests leave, if owners answer these only once."""

    def uploads_opened(self) -> UploadsOpened | None:
        """What every owner needs to add up the total by itself, once it is ready; None unless the sum is open."""
        return None

    @classmethod
    @abstractmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> Self:
        """The coordinator that saved this `opening`, about to send the same requests again."""

    @property
    def _step_name(self) -> str:
        part = f", part {self._accumulator.part}" if self._steps[self._phase].in_parts else ""
        return f"{self._phase}{part}"


def check_enough(remaining: int, terms: SumTerms, step: str, last_heard: Mapping[str, str]) -> None:
    """Raise TooFewOwners, saying at which step each of the others last answered, unless enough remain."""
    if remaining < terms.needed_owners:
        dropped = some_of([f"{owner} (last heard: {where})" for owner, where in last_heard.items()])
        raise TooFewOwners(
            f"{remaining} owners are left at step {step}, the agreement needs {terms.needed_owners}; "
            f"dropped out: {dropped or 'none'}. No total was computed",
            hint="bring the missing owners back, then run the same command again to resume",
        )


# --- both ---


@dataclass(frozen=True)
class SumKind:
    owner: type[OwnerSide]
    coordinator: type[CoordinatorSide]


def drive(side: CoordinatorSide, exchange: Exchange, exclude: Callable[[str, RemoteProtocolError], None]) -> Total:
    """Run one sum to its end.

    `exchange` sends requests and yields each answer as it arrives, None for an owner that dropped out. `exclude` is
    called for each owner that broke the protocol, which the sum then leaves out.
    """
    while requests := side.requests():
        for owner, reply in exchange(requests):
            if reply is None:
                side.drop(owner)
                continue
            try:
                side.receive(owner, reply)
            except RemoteProtocolError as violation:
                exclude(owner, violation)
                side.drop(owner)
        side.end_step()
    return side.total()


def run_in_memory(
    kind: SumKind,
    terms: SumTerms,
    identities: Mapping[str, Identity],
    vectors: Mapping[str, NDArray[np.float64]],
    random_bytes: RandomBytes,
    drops_at: Mapping[str, int] | None = None,
) -> Total:
    """Run the whole protocol in one process, with every owner of `terms` and its vector.

    An owner in `drops_at` answers no request from that exchange on, counted from 0.
    """
    owners: dict[str, OwnerSide] = {}
    encoded = {
        name: fixed_point.encode(terms.layout, vector.copy(), len(terms.roster)) for name, vector in vectors.items()
    }
    step = -1

    def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        nonlocal step
        step += 1
        for name, request in requests.items():
            if drops_at is not None and drops_at.get(name, step + 1) <= step:
                yield name, None
            elif isinstance(request, OpenSum):
                owners[name], reply = kind.owner.open(terms, identities[name], random_bytes)
                yield name, reply
            else:
                owners[name], reply = owners[name].answer(request, encoded[name], random_bytes)
                yield name, reply

    def exclude(owner: str, violation: RemoteProtocolError) -> None:
        raise LocalProtocolError(f"sum: honest owner {owner} was accused of breaking the rules") from violation

    side = kind.coordinator(terms, terms.names)
    total = drive(side, exchange, exclude)
    for owner, violation in side.violations.items():
        exclude(owner, violation)
    return total
