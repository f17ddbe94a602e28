"""What every kind of sum has in common: its terms, its two sides, and the loop that drives them.

Each side is (state, inbound) -> (state, outbound), without sockets, files or clocks. `drive` is the whole flow; the
coordinator runs it over the network and `run_in_memory` over owners in this process, so that the specification, the
tests' oracle and the product are the same lines.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.messages import Message, OpenSum
from common.tensor_layout import TensorLayout

# (phase, message type) -> next phase. What is not in a side's table is not allowed.
Transitions = Mapping[tuple[str, type[Message]], str]
Exchange = Callable[[Mapping[str, Message]], Iterator[tuple[str, Message | None]]]


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """What one sum is about. Security rests only on what each party takes from its own copy of the agreement."""

    request: OpenSum
    layout: TensorLayout
    participants: tuple[str, ...]
    needed_owners: int

    def __post_init__(self) -> None:
        if self.request.layout_digest != self.layout.digest():
            raise LocalProtocolError("sum: the request names another layout than the terms")


@dataclass(frozen=True, kw_only=True)
class Total:
    """The sum of the owners' vectors: all that a merge method ever sees."""

    layout: TensorLayout
    vector: NDArray[np.float64]  # (layout.size,)
    owners: tuple[str, ...]

    @property
    def num_owners(self) -> int:
        return len(self.owners)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.layout.read(self.vector, name)


class OwnerSide(Protocol):
    """One owner in one sum. Frozen, and small enough to be written down between two messages."""

    @classmethod
    def open(cls, request: OpenSum, owner: str, layout: TensorLayout) -> tuple[Self, Message]:
        """Begin: the first answer."""

    def answer(self, request: Message, vector: NDArray) -> tuple[Self, Message]:
        """One step. On an error nothing has happened: the old state still stands."""

    @property
    def is_done(self) -> bool:
        """Whether the vector is no longer needed."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, state: dict[str, Any], layout: TensorLayout) -> Self: ...


class CoordinatorSide(Protocol):
    """The coordinator in one sum."""

    def __init__(self, terms: SumTerms) -> None: ...

    def requests(self) -> Mapping[str, Message]:
        """The next message to each owner that must answer; empty when the total is ready."""

    def receive(self, owner: str, reply: Message) -> None:
        """Take one owner's answer. Raises RemoteProtocolError if it is not the one asked for."""

    def lose(self, owner: str) -> None:
        """The owner did not answer. Raises SessionBroken if this session cannot end without it."""

    def end_step(self) -> None:
        """Every answer of this step is in, or lost. Raises TooFewOwners."""

    def total(self) -> Total:
        """The result, once `requests` is empty."""


@dataclass(frozen=True)
class SumKind:
    owner: type[OwnerSide]
    coordinator: type[CoordinatorSide]


class SessionBroken(LocalProtocolError):  # noqa: N818 - the name is the sentence
    """This session cannot end, because of one owner; a new session without it can."""

    def __init__(self, owner: str, reason: str = "lost in the middle of its upload") -> None:
        super().__init__(f"sum: owner {owner}: {reason}")
        self.owner = owner
        self.reason = reason


def next_phase(transitions: Transitions, phase: str, message: Message, sender: str) -> str:
    """The phase after `message`. Raises RemoteProtocolError, and then nothing has happened."""
    following = transitions.get((phase, type(message)))
    if following is None:
        raise RemoteProtocolError(f"sum: {sender} sent {type(message).__name__} in phase {phase}")
    return following


def check_enough(participants: tuple[str, ...], needed_owners: int, step: str) -> None:
    """Raise TooFewOwners unless enough take part."""
    if len(participants) < needed_owners:
        raise TooFewOwners(
            f"{len(participants)} owners are left at step {step} ({', '.join(participants) or 'none'}); "
            f"the agreement needs {needed_owners}. Nothing was opened; bring the others back and run again"
        )


def drive(side: CoordinatorSide, exchange: Exchange) -> Total:
    """Run one sum to its end. `exchange` sends requests and yields each answer as it arrives, None for a lost owner.

    Raises SessionBroken, with the violation as its cause, when an owner breaks the rules.
    """
    while requests := side.requests():
        for owner, reply in exchange(requests):
            if reply is None:
                side.lose(owner)
            else:
                try:
                    side.receive(owner, reply)
                except RemoteProtocolError as violation:
                    raise SessionBroken(owner, str(violation)) from violation
        side.end_step()
    return side.total()


def run_in_memory(
    kind: SumKind,
    terms: SumTerms,
    vectors: Mapping[str, NDArray],
    lost_at: Mapping[str, int] | None = None,
) -> Total:
    """The whole protocol in one process: every owner of `terms` with its vector; `lost_at` drops owners at a step."""
    owners: dict[str, OwnerSide] = {}
    step = -1

    def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        nonlocal step
        step += 1
        for name, request in requests.items():
            if lost_at is not None and lost_at.get(name, step + 1) <= step:
                yield name, None
            elif isinstance(request, OpenSum):
                owners[name], reply = kind.owner.open(request, name, terms.layout)
                yield name, reply
            else:
                owners[name], reply = owners[name].answer(request, vectors[name])
                yield name, reply

    return drive(kind.coordinator(terms), exchange)
