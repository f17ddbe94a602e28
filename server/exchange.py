"""Packets to and from the owners: what travels together, what each step costs, and who still takes part.

An owner drops out if it does not answer, and is excluded if it breaks the protocol. The others continue without it as
long as the agreement's minimum remains. Nothing in here depends on Flower, or on what a message is about.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.agreement import Agreement
from common.errors import OwnerRefused, RemoteProtocolError, TooFewOwners, WrongModel
from common.messages import Message, Packet, Refusal, encode, payload_bytes
from common.tensor_layout import PART_BYTES
from common.text import MAX_NAMES, some_of
from server.checkpoint import OwnerCost, Step

SHOWN_TIMES = 50  # about so often the progress of a step is logged: each time, every owner is in it
RESUME_HINT = "run the same command again to resume"
log = logging.getLogger("amalgram.coordinator")


class Channel(Protocol):
    """How messages reach nodes. A node is whatever number the channel gives it."""

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        """The nodes that are connected: at least `count`, or as many as connected in time."""

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        """Send to each node; yield each answer as it arrives, None for a node that did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A message to all owners that waits for no answer: it travels ahead of the next message.

    `check(owner, reply)` raises RemoteProtocolError for a wrong answer. `on_arrival()` is called once every owner that
    still takes part has the message.
    """

    message: Message
    check: Callable[[str, Message], None]
    on_arrival: Callable[[], None] = lambda: None


@dataclass(kw_only=True)
class Exchange:
    """The owners that take part in one run, and everything that is sent to them."""

    channel: Channel
    agreement: Agreement
    steps: list[Step]  # what each step cost, those of earlier starts included
    num_steps: int  # of the whole run (Coordinator)
    dropped_out: dict[str, str] = field(default_factory=dict)  # owner -> the step at which it did
    following_bytes: int = 0  # of arrays that the answers to what waits bring about
    _steps_done: int = 0  # includes those that an earlier start of this run has done
    _ahead: list[Ahead] = field(default_factory=list)
    _nodes: dict[str, int] = field(default_factory=dict)  # owner -> node, of those that still take part
    _payload_bytes: dict[str, int] = field(default_factory=dict)  # owner -> how much of its vector has arrived

    # --- who takes part ---

    @property
    def owners(self) -> tuple[str, ...]:
        """Those that still take part, in the order of the roster."""
        return tuple(name for name in self.agreement.owner_names if name in self._nodes)

    @property
    def reply_timeout_seconds(self) -> float:
        return self.agreement.summation.reply_timeout_seconds

    def join(self, owner: str, node: int) -> None:
        """From now on `owner` takes part, through `node`."""
        self._nodes[owner] = node

    def drop(self, owner: str, reason: str) -> None:
        """Continue without an owner."""
        if self._nodes.pop(owner, None) is not None:
            self.dropped_out[owner] = self.steps[-1].name
            log.warning("owner %s dropped out at %s: %s", owner, self.steps[-1].name, reason)

    def exclude(self, owner: str, violation: RemoteProtocolError) -> None:
        """Continue without an owner that broke the protocol. Raises `violation` if too few owners remain."""
        self.drop(owner, violation.message)
        if len(self._nodes) < self.agreement.needed_owners:
            raise violation

    def check_enough(self) -> None:
        """Raise TooFewOwners if fewer owners take part than the agreement needs."""
        if len(self._nodes) < self.agreement.needed_owners:
            dropped = some_of([f"{owner} at {step}" for owner, step in self.dropped_out.items()])
            raise TooFewOwners(
                f"{len(self._nodes)} owners take part, the agreement needs {self.agreement.needed_owners} "
                f"(dropped out: {dropped})",
                hint=f"bring them back, then {RESUME_HINT}",
            )

    # --- steps ---

    def begin_step(self, name: str, phase: str, payload_bytes_each: int = 0) -> None:
        """Begin a step in which each owner sends, or is sent, a vector of `payload_bytes_each`."""
        about = {
            "step": name,
            "number": self._steps_done + 1,
            "num_steps": self.num_steps,
            "owners": list(self.owners),
            "payload_bytes_each": payload_bytes_each + self.following_bytes,
        }
        self.following_bytes = 0
        owners = f", {len(self._nodes)} owners" if self._nodes else ""
        log.info("%s%s", name, owners, extra={"about": about})
        self.steps.append(Step(name, phase))
        self._payload_bytes = dict.fromkeys(self.owners, 0)

    def count_step(self) -> None:
        """Count one more of the `num_steps` as done."""
        self._steps_done += 1

    # --- packets ---

    @property
    def ahead_bytes(self) -> int:
        """How many bytes of arrays wait for the next message."""
        return sum(payload_bytes(each.message) for each in self._ahead)

    def fits_ahead(self, message: Message) -> bool:
        """Whether `message` can travel in one packet with what waits already."""
        return self.ahead_bytes + payload_bytes(message) <= PART_BYTES

    def send_ahead(self, ahead: Ahead) -> None:
        """Let a message wait for the next one, and travel with it."""
        self._ahead.append(ahead)

    def flush(self) -> None:
        """Send what waits, if anything does, without another message. Raises TooFewOwners."""
        if not self._ahead:
            return
        ahead, self._ahead = self._ahead, []
        packet = tuple(each.message for each in ahead)  # what all are sent is one packet
        for _ in self._exchange_packets(dict.fromkeys(self.owners, packet), ahead):
            pass

    def ask_all(self, request: Message) -> None:
        """Send every owner the same message, whatever they answer."""
        for _ in self.ask(dict.fromkeys(self.owners, request)):
            pass

    def ask(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        """Send each owner its message, after what waits to travel ahead of it.

        Yields each answer as it arrives, None for an owner that dropped out.
        """
        ahead, self._ahead = self._ahead, []
        first = tuple(each.message for each in ahead)
        packet_of = {id(request): (*first, request) for request in requests.values()}  # what all are sent is one packet
        packets = {owner: packet_of[id(request)] for owner, request in requests.items()}
        for owner, answer in self._exchange_packets(packets, ahead):
            yield owner, None if answer is None else answer[-1]

    def ask_nodes(
        self, nodes: Iterable[int], request: Message, timeout_seconds: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Send nodes the same message, whoever they belong to."""
        for node, answer in self._send(dict.fromkeys(nodes, (request,)), timeout_seconds):
            yield node, answer[0] if answer is not None else None

    def poll(
        self, request: Message, timeout_seconds: float, owners: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Message | None]]:
        """Send all owners, or some, the same message. Nobody drops out, whatever the answer, and no cost is noted."""
        owner_of = {node: owner for owner, node in self._nodes.items() if owners is None or owner in owners}
        for node, reply in self.ask_nodes(owner_of, request, timeout_seconds):
            yield owner_of[node], reply

    def _exchange_packets(
        self, packets: Mapping[str, Packet], ahead: list[Ahead]
    ) -> Iterator[tuple[str, Packet | None]]:
        """Send each owner its packet, which begins with `ahead`; note what it costs and who drops out."""
        step, started = self.steps[-1], time.monotonic()
        owner_of = {self._nodes[owner]: owner for owner in packets}
        sizes: dict[int, int] = {}  # what all are sent is one packet
        for owner, packet in packets.items():
            if id(packet) not in sizes:
                sizes[id(packet)] = packet_bytes(packet)
            cost = step.by_owner.setdefault(owner, OwnerCost())
            cost.messages += 1
            cost.bytes_sent += sizes[id(packet)]
        waiting, waiting_since = dict.fromkeys(packets), started
        every = max(1, len(packets) // SHOWN_TIMES)
        self._show_progress([], waiting)
        by_node = {self._nodes[owner]: packet for owner, packet in packets.items()}
        for node, answer in self._send(by_node, self.reply_timeout_seconds):
            owner = owner_of[node]
            step.by_owner[owner].waited_seconds += time.monotonic() - waiting_since
            taken = self._take_answer(owner, packets[owner], answer, ahead)
            if taken is not None:
                step.by_owner[owner].bytes_received += packet_bytes(taken)
                self._payload_bytes[owner] += sum(map(payload_bytes, (*packets[owner], *taken)))
            del waiting[owner]
            if len(waiting) % every == 0 or len(waiting) <= MAX_NAMES:
                self._show_progress([each for each in packets if each in self._nodes and each not in waiting], waiting)
            yield owner, taken
            waiting_since = time.monotonic()
        self._note_arrival(ahead)
        step.seconds += time.monotonic() - started

    def _take_answer(self, owner: str, packet: Packet, answer: Packet | None, ahead: list[Ahead]) -> Packet | None:
        """The answer, once its replies to what travelled ahead are checked; None if the owner dropped out."""
        if answer is None:
            self.drop(owner, "no answer")
            return None
        last = answer[-1]
        if isinstance(last, Refusal):
            if last.code == WrongModel.code or len(self._nodes) - 1 < self.agreement.needed_owners:
                raise OwnerRefused(owner, last.code)
            self.drop(owner, f"it refused ({last.code})")
            return None
        try:
            if len(answer) != len(packet):  # check: answers-fit-their-packet
                raise RemoteProtocolError(f"owner {owner} answered {len(answer)} of {len(packet)} messages")
            for each, reply in zip(ahead, answer, strict=False):
                each.check(owner, reply)
        except RemoteProtocolError as violation:
            self.exclude(owner, violation)
            return None
        return answer

    def _note_arrival(self, ahead: list[Ahead]) -> None:
        """Everybody has these messages now. Raises TooFewOwners if owners must come back that lack them."""
        if ahead:
            self.check_enough()
        for each in ahead:
            each.on_arrival()

    def _send(self, packets: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        kinds = [type(message).__name__ for message in next(iter(packets.values()), ())]
        log.debug("to %d owners: %s", len(packets), ", ".join(kinds), extra={"about": {"sent": kinds}})
        return self.channel.exchange(packets, timeout_seconds)

    def _show_progress(self, done: list[str], waiting: Iterable[str]) -> None:
        waiting = list(waiting)
        step, count = self.steps[-1].name, len(done) + len(waiting)
        about = {"step": step, "done": done, "waiting_for": waiting, "payload_bytes": dict(self._payload_bytes)}
        log.debug("%s: %d of %d owners have answered", step, len(done), count, extra={"about": about})


def packet_bytes(packet: Packet) -> int:
    """The size of everything in a packet that grows: arrays, and lists of records."""
    values = [value for message in packet for value in encode(message).fields.values()]
    return sum(len(value) for value in values if isinstance(value, bytes)) + sum(map(payload_bytes, packet))
