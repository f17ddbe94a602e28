"""Drives sums over owners: send, wait, who is left, next step. Generic over the kind of sum and over the channel."""

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.agreement import Agreement
from common.certificates import Candidate, body_of, candidates_digest, check_burned_by, result_body
from common.domain_separation import Domain
from common.errors import ConsentError, OwnerRefused, RemoteProtocolError, SettingsError, TooFewOwners
from common.identity import Identity, verify
from common.mapped import sha256_of
from common.messages import (
    PROTOCOL_VERSION,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CandidateReceived,
    Finish,
    Finished,
    Message,
    OpenSum,
    Packet,
    Present,
    Receipts,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
    encode,
    payload_bytes,
)
from common.summation import SUMMATIONS
from common.summation.protocol import CoordinatorSide, SumKind, SumTerms, Total, drive
from common.summation.records import Signed
from common.tensor_layout import PART_BYTES, TensorLayout
from common.thresholds import burn_quorum
from server.checkpoint import Checkpoint, OwnerCost, SentCandidate, Step

FINISH_TIMEOUT_SECONDS = 60.0
log = logging.getLogger("amalgram.coordinator")


class Channel(Protocol):
    """How messages reach nodes; a node is whatever the channel calls one."""

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        """The nodes that are there: at least `count`, or as many as came in time."""

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        """Send to each node; yield each answer as it arrives, None for a node that did not answer in time."""


@dataclass
class OpenedSum:
    """A sum whose total the coordinator learned; `owners` are those whose numbers are in it."""

    statistic: str
    layout: TensorLayout
    owners: tuple[str, ...]
    destroyed: bool = False


@dataclass(kw_only=True)
class Coordinator:
    """One run of one agreement over one channel. What the checkpoint has of it is not asked for again."""

    channel: Channel
    agreement: Agreement
    identity: Identity
    checkpoint: Checkpoint
    num_steps: int  # of the whole run
    lost: dict[str, str] = field(default_factory=dict)  # owner -> where it was lost
    candidates: list[Candidate] = field(default_factory=list)  # everything that was sent to the owners
    sums: list[OpenedSum] = field(default_factory=list)  # everything that was learned from them
    _steps_done: int = 0  # counts what an earlier start of this run has done, too
    _round: int = -1
    _underway: list[SentCandidate] = field(default_factory=list)  # candidates that not all owners have yet
    _ahead: list[Message] = field(default_factory=list)  # what travels ahead of the next message to all owners
    _signed: list[Signed] = field(default_factory=list)  # the owners' signatures under the result
    _nodes: dict[str, int] = field(default_factory=dict)  # owner -> node, of those still taking part
    _payload_bytes: dict[str, int] = field(default_factory=dict)  # owner -> how much of its vector has arrived

    @property
    def run(self) -> str:
        return self.checkpoint.run

    @property
    def steps(self) -> list[Step]:
        return self.checkpoint.steps

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
        refusals, pending = [], set()
        for node, reply in self._ask_nodes(nodes, request, timeout):
            if isinstance(reply, Refusal):
                refusals.append((node, reply.code))
            elif isinstance(reply, Present) and reply.run == self.run:
                if reply.owner not in self.agreement.owner_names:
                    raise RemoteProtocolError(f"roll call: a node calls itself {reply.owner}, who is not on the roster")
                if reply.owner in self._nodes:
                    raise RemoteProtocolError(f"roll call: two nodes call themselves {reply.owner}")
                self._check_present(reply)
                self._nodes[reply.owner] = node
                pending |= {reply.pending} - {""}
            elif reply is not None:
                raise RemoteProtocolError(f"roll call: a node answered {type(reply).__name__}")
        missing = [name for name in self.agreement.owner_names if name not in self._nodes]
        for name in missing:
            self.lost[name] = "roll call"
        if refusals and len(self._nodes) < self.agreement.needed_owners:
            who = missing[0] if len(missing) == 1 else f"among {', '.join(missing)}"
            raise OwnerRefused(who, refusals[0][1])
        self._check_enough()
        kept = self.checkpoint.kept_opening()
        going_on = {kept[0].session} if kept is not None else set()
        # To an owner that was lost before it could help to open a session, that one is pending for good.
        for session in sorted(pending - self.checkpoint.opened_sessions - going_on):
            self._certify_as_over(session)
        self._steps_done += 1

    def _check_present(self, reply: Present) -> None:
        body = bytes.fromhex(self.agreement.digest()) + reply.pending.encode()
        key = self.agreement.roster[reply.owner]
        verify(key, Domain.SIGN_PRESENT, bytes.fromhex(self.run), reply.owner, body, reply.signature)

    def _certify_as_over(self, session: str) -> None:
        """An earlier run ended inside `session`: have the owners sign that it will never be opened, so that those who
        offered their vectors to it may offer them again. Owners that helped to open it refuse, and rightly.
        """
        self._start("certify that an interrupted session is over")
        owner_of = {node: owner for owner, node in self._nodes.items()}
        request, timeout = BurnSession(run=self.run, session=session), self.agreement.summation.reply_timeout_seconds
        signed = []
        for node, reply in self._ask_nodes(owner_of, request, timeout):
            if not (isinstance(reply, SessionBurned) and reply.session == session):
                continue
            each = Signed(self.agreement.owner_names.index(owner_of[node]), reply.signature)
            with suppress(RemoteProtocolError):  # one bad signature must not spoil the others' certificate
                check_burned_by(self.agreement, session, [each])
                signed.append(each)
        needed = burn_quorum(len(self.agreement.owners), self.agreement.colluders)
        if len(signed) < needed:
            raise ConsentError(
                f"an earlier run broke off while its sum was being opened: {len(signed)} owners certify that it was "
                f"not, {needed} must. What was given cannot be given again; a new run needs a new agreement"
            )
        certificate = BurnCertificate(run=self.run, session=session, signatures=Signed.pack_all(signed))
        for _ in self._ask(dict.fromkeys(self.owners, certificate)):
            pass
        self._check_enough()

    def sum(self, statistic: str, layout: TensorLayout, models: tuple[str, ...] = ()) -> Total:
        """The total of one statistic over the owners; goes on without those that are lost or break the rules."""
        total = self.checkpoint.next_total(statistic, models, layout)
        if total is None:
            session, total = self._sum_over_owners(statistic, layout, models)
            self.checkpoint.keep_total(statistic, models, session, total)
        self._steps_done += 1
        self.sums.append(OpenedSum(statistic, layout, total.owners))
        return total

    def _sum_over_owners(self, statistic: str, layout: TensorLayout, models: tuple[str, ...]) -> tuple[str, Total]:
        ahead_bytes = sum(map(payload_bytes, self._ahead))
        self._start(f"sum of {statistic}", layout.num_bytes + ahead_bytes)
        request, side = self._reopened_sum(layout) or self._new_sum(statistic, layout, models)

        def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
            opening = side.opening()
            if opening is not None:
                self.checkpoint.keep_opening(request, opening)
            return self._ask(requests)

        return request.session, drive(side, exchange, self._exclude)

    def _reopened_sum(self, layout: TensorLayout) -> tuple[OpenSum, CoordinatorSide] | None:
        """The sum that was being opened when an earlier start of this run ended; its owners open no other."""
        kept = self.checkpoint.kept_opening()
        if kept is None:
            return None
        request, opening = kept
        side = self._kind.coordinator.reopen(self._terms(request, layout), opening)
        for owner in set(opening.state["remaining"]) - set(self.owners):
            side.lose(owner)
        return request, side

    def _new_sum(
        self, statistic: str, layout: TensorLayout, models: tuple[str, ...]
    ) -> tuple[OpenSum, CoordinatorSide]:
        # Owners accept a round once only, in ascending order, also across restarts of this process: so the clock.
        self._round = max(self._round + 1, time.time_ns() // 1_000_000)
        request = OpenSum(
            run=self.run,
            agreement_digest=self.agreement.digest(),
            round=self._round,
            nonce=secrets.token_hex(32),
            statistic=statistic,
            models=",".join(models),
            candidates_digest=candidates_digest(self.candidates),
            layout_digest=layout.digest(),
        )
        return request, self._kind.coordinator(self._terms(request, layout), self.owners, self.checkpoint.zeros)

    def _terms(self, request: OpenSum, layout: TensorLayout) -> SumTerms:
        return SumTerms(
            request=request,
            layout=layout,
            roster=self.agreement.roster,
            needed_owners=self.agreement.needed_owners,
            colluders=self.agreement.colluders,
        )

    @property
    def _kind(self) -> SumKind:
        return SUMMATIONS[self.agreement.summation.kind]

    def destroy(self, statistic: str, total: Total) -> None:
        """Overwrite a total that has served, and note that this was done."""
        total.destroy()
        for each in self.sums:
            each.destroyed |= each.statistic == statistic

    def _exclude(self, owner: str, violation: RemoteProtocolError) -> None:
        """An owner broke the rules: the others go on without it, where enough remain."""
        self._lose(owner, str(violation))
        if len(self._nodes) < self.agreement.needed_owners:
            raise violation

    def send_candidate(self, model: str, split: str, layout: TensorLayout, delta: NDArray[np.float32]) -> None:
        """Hand every owner a merged candidate, which each evaluates on its own rows when it is whole. It travels in
        parts: those that fill messages leave at once, the last ones ahead of the next sum's first message.
        """
        candidate = (model, split, sha256_of(delta))
        self.candidates.append(candidate)
        if self._is_out(candidate):
            return
        self._underway.append(SentCandidate(*candidate, bytes=delta.nbytes))
        slices = layout.part_slices(bytes_per_number=4)
        for part, position in enumerate(slices):
            message = CandidatePart(
                run=self.run,
                agreement_digest=self.agreement.digest(),
                model=model,
                split=split,
                part=part,
                parts=len(slices),
                payload=delta[position].copy(),  # what waits must not keep the whole delta in memory
            )
            if sum(map(payload_bytes, self._ahead)) + payload_bytes(message) > PART_BYTES:
                self._send_ahead(f"candidate {model} on {split}", delta.nbytes)
            self._ahead.append(message)

    def _send_ahead(self, step: str, payload_bytes_each: int = 0) -> None:
        """Send what waits for the next message, and wait for none. Raises TooFewOwners."""
        if self.steps[-1].name != step:
            self._start(step, payload_bytes_each)
        last = self._ahead.pop()
        for _ in self._ask(dict.fromkeys(self.owners, last)):
            pass
        self._note_candidates((last,))

    def _is_out(self, candidate: Candidate) -> bool:
        """Whether every owner has this candidate already, from an earlier start of this run."""
        if len(self.candidates) > len(self.checkpoint.candidates):
            return False
        if self.checkpoint.candidates[len(self.candidates) - 1].candidate != candidate:
            raise SettingsError(
                f"merge: {candidate[0]} is not to the last bit the model that was sent before the interruption; go on "
                "with the same machine, number of threads and versions as then"
            )
        return True

    def send_result(self, model: str, model_digest: str) -> None:
        """Sign what is published; every owner signs the same when it comes, ahead of the next message."""
        digest = candidates_digest(self.candidates)
        body = result_body(self.agreement, model, model_digest, digest)
        result = Result(
            run=self.run,
            model=model,
            model_digest=model_digest,
            candidates_digest=digest,
            signature=self.identity.sign(Domain.SIGN_RESULT, bytes.fromhex(self.run), body),
        )
        self._ahead.append(result)

    def confirm_result(self) -> None:
        """Give every owner everybody's signature under the result, which ends the run. Raises TooFewOwners."""
        self._start("result")
        if self._ahead:  # the sum that it was to travel with was in before an interruption
            self._send_ahead("result")
        receipts = Receipts(run=self.run, signatures=Signed.pack_all(self._signed))
        for _ in self._ask(dict.fromkeys(self.owners, receipts)):
            pass  # whoever is lost here has no receipt, and that is all: every figure is in
        self._steps_done += 1

    @property
    def receipts(self) -> tuple[str, ...]:
        """The owners that signed the result."""
        return tuple(self.agreement.owner_names[each.owner] for each in self._signed)

    def finish(self) -> None:
        """Tell the owners to forget a run that has no result. Whoever does not confirm it is named, and that is all."""
        log.info("finish", extra={"about": {"step": "finish"}})
        owner_of = {node: owner for owner, node in self._nodes.items()}
        for node, reply in self._ask_nodes(owner_of, Finish(run=self.run), FINISH_TIMEOUT_SECONDS):
            if not isinstance(reply, Finished):
                log.warning("owner %s did not confirm that it has forgotten the run", owner_of[node])

    def _ask(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
        """Send each owner its message, and what is to travel ahead of it; yield each answer as it arrives, None for an
        owner that is lost.
        """
        step, ahead = self.steps[-1], tuple(self._ahead)
        self._ahead.clear()
        started = time.monotonic()
        owner_of = {self._nodes[owner]: owner for owner in requests}
        packet_of = {id(request): (*ahead, request) for request in requests.values()}  # what all are sent is one packet
        packets = {self._nodes[owner]: packet_of[id(request)] for owner, request in requests.items()}
        for node, packet in packets.items():
            cost = step.by_owner.setdefault(owner_of[node], OwnerCost())
            cost.messages += 1
            cost.bytes_sent += packet_bytes(packet)
        waiting_since = started
        waiting = list(requests)
        self._tell_progress([], waiting)
        for node, answer in self._exchange(packets, self.agreement.summation.reply_timeout_seconds):
            owner = owner_of[node]
            cost = step.by_owner[owner]
            cost.waited_seconds += time.monotonic() - waiting_since
            reply = self._take_answer(owner, packets[node], answer)
            if reply is not None and answer is not None:
                cost.bytes_received += packet_bytes(answer)
                self._payload_bytes[owner] += sum(map(payload_bytes, (*packets[node], *answer)))
            waiting.remove(owner)
            self._tell_progress([each for each in requests if each in self._nodes and each not in waiting], waiting)
            yield owner, reply
            waiting_since = time.monotonic()
        self._note_candidates(ahead)
        step.seconds += time.monotonic() - started

    def _take_answer(self, owner: str, packet: Packet, answer: Packet | None) -> Message | None:
        """The answer to the last message of a packet, once those to the others are taken; None if the owner is lost."""
        if answer is None:
            self._lose(owner, "no answer")
            return None
        last = answer[-1]
        if isinstance(last, Refusal):
            if len(self._nodes) - 1 < self.agreement.needed_owners:
                raise OwnerRefused(owner, last.code)
            log.warning("owner %s refused (%s) at %s", owner, last.code, self.steps[-1].name)
            self._lose(owner, "no answer")
            return None
        try:
            if len(answer) != len(packet):
                raise RemoteProtocolError(f"owner {owner} answered {len(answer)} of {len(packet)} messages")
            for request, reply in zip(packet, answer, strict=True):
                self._check_reply(owner, request, reply)
        except RemoteProtocolError as violation:
            self._exclude(owner, violation)
            return None
        return last

    def _check_reply(self, owner: str, request: Message, reply: Message) -> None:
        """Look at an answer that belongs to no sum; the owner's signature under the result is kept."""
        if isinstance(request, CandidatePart):
            expected = CandidateReceived(run=self.run, owner=owner, model=request.model, part=request.part)
            if reply != expected:
                raise RemoteProtocolError(f"owner {owner} answered a candidate with {type(reply).__name__}")
        if isinstance(request, Result):
            if not isinstance(reply, ResultReceived):
                raise RemoteProtocolError(f"owner {owner} answered a result with {type(reply).__name__}")
            key, body = self.agreement.roster[owner], body_of(self.agreement, request)
            verify(key, Domain.SIGN_RECEIPT, bytes.fromhex(self.run), owner, body, reply.signature)
            self._signed.append(Signed(self.agreement.owner_names.index(owner), reply.signature))

    def _note_candidates(self, packet: Packet) -> None:
        """Of these messages, which all have now, some complete a candidate. Raises TooFewOwners instead where others
        must come back, who have them not.
        """
        if packet:
            self._check_enough()
        for part in packet:
            if isinstance(part, CandidatePart) and part.part + 1 == part.parts:
                self.checkpoint.keep_candidate(replace(self._underway.pop(0), owners=self.owners))

    def _ask_nodes(
        self, nodes: Iterable[int], request: Message, timeout_seconds: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Send the same message to nodes that need not be owners who take part."""
        for node, answer in self._exchange(dict.fromkeys(nodes, (request,)), timeout_seconds):
            yield node, answer[0] if answer is not None else None

    def _exchange(self, packets: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        kinds = [type(message).__name__ for message in next(iter(packets.values()), ())]
        log.debug("to %d owners: %s", len(packets), ", ".join(kinds), extra={"about": {"sent": kinds}})
        return self.channel.exchange(packets, timeout_seconds)

    def _tell_progress(self, done: list[str], waiting: list[str]) -> None:
        step, count = self.steps[-1].name, len(done) + len(waiting)
        about = {"step": step, "done": done, "waiting_for": list(waiting), "payload_bytes": dict(self._payload_bytes)}
        log.debug("%s: %d of %d owners are done", step, len(done), count, extra={"about": about})

    def _lose(self, owner: str, reason: str) -> None:
        if self._nodes.pop(owner, None) is not None:
            self.lost[owner] = self.steps[-1].name
            log.warning("owner %s is lost at %s: %s", owner, self.steps[-1].name, reason)

    def _start(self, name: str, payload_bytes: int = 0) -> None:
        """Begin a step, in which each owner sends or is sent a vector of `payload_bytes`."""
        about = {
            "step": name,
            "number": self._steps_done + 1,
            "num_steps": self.num_steps,
            "owners": list(self.owners),
            "payload_bytes_each": payload_bytes,
        }
        owners = f", {len(self._nodes)} owners" if self._nodes else ""
        log.info("%s%s", name, owners, extra={"about": about})
        self.steps.append(Step(name))
        self._payload_bytes = dict.fromkeys(self.owners, 0)

    def _check_enough(self) -> None:
        if len(self._nodes) < self.agreement.needed_owners:
            lost = ", ".join(f"{owner} (at {where})" for owner, where in self.lost.items())
            raise TooFewOwners(
                f"{len(self._nodes)} owners take part, the agreement needs {self.agreement.needed_owners}; "
                f"lost: {lost}. Bring them back and run the same command again"
            )


def packet_bytes(packet: Packet) -> int:
    """Everything of a packet that grows: arrays, and lists of records."""
    values = [value for message in packet for value in encode(message).fields.values()]
    return sum(len(value) for value in values if isinstance(value, bytes)) + sum(map(payload_bytes, packet))
