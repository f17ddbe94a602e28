"""Drives sums over owners: send, wait, who is left, next step. Generic over the kind of sum and over the channel."""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.agreement import Agreement
from common.errors import OwnerRefused, RemoteProtocolError, TooFewOwners
from common.messages import (
    PROTOCOL_VERSION,
    CandidatePart,
    CandidateReceived,
    Finish,
    Finished,
    Message,
    OpenSum,
    Present,
    Refusal,
    RollCall,
    encode,
)
from common.summation import SUMMATIONS
from common.summation.protocol import SessionBroken, SumTerms, Total, drive
from common.tensor_layout import TensorLayout

FINISH_TIMEOUT_SECONDS = 60.0
log = logging.getLogger("amalgram.coordinator")


class Channel(Protocol):
    """How messages reach nodes; a node is whatever the channel calls one."""

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        """The nodes that are there: at least `count`, or as many as came in time."""

    def exchange(self, requests: Mapping[int, Message], timeout_seconds: float) -> Iterator[tuple[int, Message | None]]:
        """Send to each node; yield each answer as it arrives, None for a node that did not answer in time."""


@dataclass
class Step:
    """What one step of a run cost."""

    name: str
    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(kw_only=True)
class Coordinator:
    """One run of one agreement over one channel."""

    channel: Channel
    agreement: Agreement
    run: str = field(default_factory=lambda: secrets.token_hex(32))
    steps: list[Step] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)  # owner -> where it was lost
    _nodes: dict[str, int] = field(default_factory=dict)  # owner -> node, of those still taking part

    @property
    def owners(self) -> tuple[str, ...]:
        """Those still taking part, in the order of the roster."""
        return tuple(name for name in self.agreement.owner_names if name in self._nodes)

    def roll_call(self) -> None:
        """Find out which node speaks for which owner. Raises TooFewOwners, or OwnerRefused."""
        self._start("roll call")
        timeout = self.agreement.summation.reply_timeout_seconds
        nodes = self.channel.wait_for_nodes(len(self.agreement.owners), timeout)
        request = RollCall(version=PROTOCOL_VERSION, run=self.run, agreement_digest=self.agreement.digest())
        refusals = []
        for node, reply in self.channel.exchange(dict.fromkeys(nodes, request), timeout):
            if isinstance(reply, Refusal):
                refusals.append((node, reply.code))
            elif isinstance(reply, Present) and reply.run == self.run:
                if reply.owner not in self.agreement.owner_names:
                    raise RemoteProtocolError(f"roll call: a node calls itself {reply.owner}, who is not on the roster")
                if reply.owner in self._nodes:
                    raise RemoteProtocolError(f"roll call: two nodes call themselves {reply.owner}")
                self._nodes[reply.owner] = node
            elif reply is not None:
                raise RemoteProtocolError(f"roll call: a node answered {type(reply).__name__}")
        missing = [name for name in self.agreement.owner_names if name not in self._nodes]
        for name in missing:
            self.lost[name] = "roll call"
        if refusals and len(self._nodes) < self.agreement.needed_owners:
            who = missing[0] if len(missing) == 1 else f"among {', '.join(missing)}"
            raise OwnerRefused(who, refusals[0][1])
        self._check_enough()

    def sum(self, statistic: str, layout: TensorLayout, models: tuple[str, ...] = ()) -> Total:
        """The total of one statistic over the owners; begins again without an owner that is lost midway."""
        self._start(f"sum of {statistic}")
        kind = SUMMATIONS[self.agreement.summation.kind]
        while True:
            request = OpenSum(
                run=self.run,
                agreement_digest=self.agreement.digest(),
                session=secrets.token_hex(32),
                statistic=statistic,
                models=",".join(models),
                layout_digest=layout.digest(),
            )
            terms = SumTerms(
                request=request,
                layout=layout,
                participants=self.owners,
                needed_owners=self.agreement.needed_owners,
            )
            try:
                return drive(kind.coordinator(terms), self._ask)
            except SessionBroken as broken:
                self._lose(broken.owner, broken.reason)
                if broken.__cause__ is not None and len(self._nodes) < self.agreement.needed_owners:
                    raise broken.__cause__ from None
                self._check_enough()

    def send_candidate(self, model: str, split: str, layout: TensorLayout, delta: NDArray[np.float32]) -> None:
        """Hand every owner a merged candidate, in parts; each evaluates it on its own rows when it is whole."""
        self._start(f"candidate {model} on {split}")
        slices = layout.part_slices(bytes_per_number=4)
        for part, position in enumerate(slices):
            message = CandidatePart(
                run=self.run,
                agreement_digest=self.agreement.digest(),
                model=model,
                split=split,
                part=part,
                parts=len(slices),
                payload=delta[position],
            )
            for owner, reply in self._ask(dict.fromkeys(self.owners, message)):
                if reply is not None and not (
                    isinstance(reply, CandidateReceived) and (reply.owner, reply.part) == (owner, part)
                ):
                    raise RemoteProtocolError(f"owner {owner} answered a candidate with {type(reply).__name__}")
            self._check_enough()

    def finish(self) -> None:
        """Tell the owners to forget this run. Whoever does not confirm it is named, and nothing else changes."""
        log.info("finish")
        owner_of = {node: owner for owner, node in self._nodes.items()}
        requests = dict.fromkeys(owner_of, Finish(run=self.run))
        for node, reply in self.channel.exchange(requests, FINISH_TIMEOUT_SECONDS):
            if not isinstance(reply, Finished):
                log.warning("owner %s did not confirm that it has forgotten the run", owner_of[node])

    def _ask(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        """Send each owner its message; yield each answer as it arrives, None for an owner that is lost."""
        step = self.steps[-1]
        started = time.monotonic()
        owner_of = {self._nodes[owner]: owner for owner in requests}
        by_node = {self._nodes[owner]: request for owner, request in requests.items()}
        step.bytes_sent += sum(_payload_bytes(request) for request in requests.values())
        for node, reply in self.channel.exchange(by_node, self.agreement.summation.reply_timeout_seconds):
            owner = owner_of[node]
            if isinstance(reply, Refusal):
                if len(self._nodes) - 1 < self.agreement.needed_owners:
                    raise OwnerRefused(owner, reply.code)
                log.warning("owner %s refused (%s) at %s", owner, reply.code, step.name)
                reply = None
            if reply is None:
                self._lose(owner, "no answer")
            else:
                step.bytes_received += _payload_bytes(reply)
            yield owner, reply
        step.seconds += time.monotonic() - started

    def _lose(self, owner: str, reason: str) -> None:
        if self._nodes.pop(owner, None) is not None:
            self.lost[owner] = self.steps[-1].name
            log.warning("owner %s is lost at %s: %s", owner, self.steps[-1].name, reason)

    def _start(self, name: str) -> None:
        log.info("%s", name)
        self.steps.append(Step(name))

    def _check_enough(self) -> None:
        if len(self._nodes) < self.agreement.needed_owners:
            lost = ", ".join(f"{owner} (at {where})" for owner, where in self.lost.items())
            raise TooFewOwners(
                f"{len(self._nodes)} owners take part, the agreement needs {self.agreement.needed_owners}; "
                f"lost: {lost}. Bring them back and run the same command again"
            )


def _payload_bytes(message: Message) -> int:
    payload = encode(message).payload
    return 0 if payload is None else payload.nbytes
