"""Drives one run of an agreement: roll call, rounds and deliveries as they are asked for, result.

The order is the schedule's (common/schedule.py), which merge.py walks through. Generic over the kind of sum and over
the channel. What the checkpoint holds is neither summed nor sent again.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from common.agreement import Agreement
from common.certificates import (
    Delivered,
    body_of,
    deliveries_digest,
    delivery_body,
    nonces_digest,
    presence_body,
    result_body,
)
from common.domain_separation import Domain
from common.errors import FalseTotal, OwnerRefused, RemoteProtocolError, SettingsError, TooFewOwners
from common.identity import Identity, verify
from common.mapped import sha256_of
from common.messages import (
    PROTOCOL_VERSION,
    CandidatePart,
    CheckKeys,
    CheckShares,
    CorrectionPart,
    DeliveryPart,
    Draw,
    Drawn,
    Finish,
    Finished,
    MergedStepPart,
    Message,
    MixturePart,
    OpeningChecked,
    OpenSum,
    PartReceived,
    Present,
    Receipts,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    ScalesPart,
    UploadsOpened,
)
from common.packed import packed
from common.publication import PublishedReceipts
from common.schedule import Delivery, Round, Schedule
from common.summation import SUMMATIONS, key_agreement
from common.summation.masked.evidence import ProvenLie
from common.summation.pairwise import PairwiseSum, verify_nonce
from common.summation.protocol import CoordinatorSide, SumAbandoned, SumKind, SumTerms, Total, drive
from common.summation.records import Nonce, Signed
from common.summation.totals import SummedTensors
from common.text import some_of
from common.verification import wrong_claims
from server import evidence
from server.checkpoint import Checkpoint, SavedDelivery, Step
from server.exchange import RESUME_HINT, Ahead, Channel, Exchange, log
from server.recovery import certify_as_over, reopen_sum, sessions_to_certify

FINISH_TIMEOUT_SECONDS = 60.0
MAX_ROUNDS_AHEAD = 2**20  # how much further one owner may be than the others, from sums that they missed


@dataclass
class OpenedSum:
    """A round whose total the coordinator learned; `owners` are those whose numbers are in it."""

    round: Round
    owners: tuple[str, ...]
    destroyed: bool = False


@dataclass(kw_only=True)
class Coordinator:
    """One run of one agreement over one channel."""

    channel: Channel
    agreement: Agreement
    identity: Identity
    checkpoint: Checkpoint
    schedule: Schedule
    exchange: Exchange = field(init=False)
    delivered: list[Delivered] = field(default_factory=list)  # everything that was sent to the owners
    sums: list[OpenedSum] = field(default_factory=list)  # everything that was learned from them
    _next_round: int = 0
    _signed: list[Signed] = field(default_factory=list)  # the owners' signatures under the result

    def __post_init__(self) -> None:
        self.exchange = Exchange(
            channel=self.channel,
            agreement=self.agreement,
            steps=self.checkpoint.steps,
            # the roll call, every round, the result; of a check, only the nonces are a step of their own
            num_steps=1 + len(self.schedule.rounds) + 1,
        )

    @property
    def run(self) -> str:
        return self.checkpoint.run

    @property
    def steps(self) -> list[Step]:
        """What each step cost."""
        return self.checkpoint.steps

    @property
    def owners(self) -> tuple[str, ...]:
        """Those that still take part, in the order of the roster."""
        return self.exchange.owners

    @property
    def dropped_out(self) -> dict[str, str]:
        """The owners that dropped out, each with the step at which it did."""
        return self.exchange.dropped_out

    @property
    def excluded(self) -> dict[str, str]:
        """The owners that broke the rules of a sum, each with what it did. They stay out for the rest of the run."""
        return self.checkpoint.excluded

    @property
    def receipts(self) -> tuple[str, ...]:
        """The owners that signed the result."""
        return tuple(self.agreement.owner_names[each.owner] for each in self._signed)

    # --- roll call ---

    def roll_call(self) -> None:
        """Find out which node speaks for which owner. Raises TooFewOwners, or OwnerRefused."""
        self.exchange.begin_step("roll call", "roll call")
        timeout = self.exchange.reply_timeout_seconds
        nodes = self.channel.wait_for_nodes(len(self.agreement.owners), timeout)
        request = RollCall(version=PROTOCOL_VERSION, run=self.run, agreement_digest=self.agreement.digest())
        refusals, violations, present = [], [], []
        for node, reply in self.exchange.ask_nodes(nodes, request, timeout):
            if isinstance(reply, Refusal):
                refusals.append(reply.code)
                continue
            try:
                if reply is None or not self._is_welcome(reply):
                    continue
            except RemoteProtocolError as violation:  # one node must not keep the others from starting
                log.warning("%s; that node is left out", violation.message)
                violations.append(violation)
                continue
            self.exchange.join(reply.owner, node)
            present.append(reply)
        self._check_attendance(refusals, violations)
        self._choose_next_round(present)
        pending = {each.pending for each in present} - {""}
        for session in sessions_to_certify(pending, self.checkpoint):
            certify_as_over(self.exchange, self.agreement, self.run, session)
        self.exchange.count_step()

    def _is_welcome(self, reply: Message) -> TypeGuard[Present]:
        """Whether a node speaks for an owner that takes part. Raises RemoteProtocolError if it speaks for none."""
        if not isinstance(reply, Present) or reply.run != self.run:
            raise RemoteProtocolError(f"roll call: a node answered {type(reply).__name__}")
        if reply.owner not in self.agreement.owner_names:
            raise RemoteProtocolError(f"roll call: a node calls itself {reply.owner}, which is not on the roster")
        if reply.owner in self.owners:  # check: one-node-an-owner
            raise RemoteProtocolError(f"roll call: two nodes call themselves {reply.owner}")
        body = presence_body(self.agreement.digest(), reply.next_round, reply.pending)
        key = self.agreement.roster[reply.owner]
        verify(
            key, Domain.SIGN_PRESENT, bytes.fromhex(self.run), reply.owner, body, reply.signature
        )  # check: presence-is-signed
        if reply.owner in self.excluded:  # check: who-lied-stays-out
            log.warning("owner %s is left out: %s", reply.owner, self.excluded[reply.owner])
        return reply.owner not in self.excluded

    def _check_attendance(self, refusals: list[str], violations: list[RemoteProtocolError]) -> None:
        missing = [name for name in self.agreement.owner_names if name not in self.owners]
        self.exchange.dropped_out.update(dict.fromkeys(missing, "roll call"))
        if len(self.owners) >= self.agreement.needed_owners:
            return
        if self.excluded:
            raise RemoteProtocolError(
                f"roll call: {len(self.owners)} owners are left, the agreement needs {self.agreement.needed_owners}. "
                f"Left out: {'; '.join(self.excluded.values())}",
                hint=f"make a new agreement without {', '.join(self.excluded)}",
            )
        if refusals:
            raise OwnerRefused(missing[0] if len(missing) == 1 else f"among {some_of(missing)}", refusals[0])
        if violations:
            broken = "; ".join(each.message for each in violations)
            raise RemoteProtocolError(f"{broken}; there is no other node for {some_of(missing)}")
        self.exchange.check_enough()

    def _choose_next_round(self, present: list[Present]) -> None:
        """The lowest number that every owner accepts.

        An owner that claims a number near the end of the range would use the range up for everybody, for good. If at
        most c owners do that (or one, if c is 0), then the highest claim but c is at most an honest owner's, and honest
        owners differ by the few sums that some of them missed. Raises RemoteProtocolError if too few owners remain.
        """
        claims = sorted((reply.next_round for reply in present), reverse=True)
        liars = max(1, self.agreement.colluders)
        highest = claims[min(liars, len(claims) - 1)] + MAX_ROUNDS_AHEAD
        for reply in present:
            if reply.next_round > highest:  # check: rounds-are-not-used-up
                self.exchange.exclude(
                    reply.owner,
                    RemoteProtocolError(
                        f"roll call: owner {reply.owner} wants the next sum to be number {reply.next_round}, at most "
                        f"{highest} fits what the others say"
                    ),
                )
            else:
                self._next_round = max(self._next_round, reply.next_round)

    # --- rounds ---

    def sum(self, round: Round) -> Total:
        """The total of a round, over the owners that neither drop out nor break the protocol. Raises TooFewOwners."""
        total = self.checkpoint.next_total(round)
        if total is None:
            total = self._sum_over_owners(round)
        if round.is_open and not self._takes_all_later(round):
            reason = f"it is not in the {round.name}, so it could not sign the result"
            self.leave_out_absent(total.owners, reason)  # check: who-cannot-sign-is-not-counted
        self._relay_uploads(round, total)
        self.exchange.count_step()
        self.sums.append(OpenedSum(round, total.owners))
        return total

    def _takes_all_later(self, round: Round) -> bool:
        """Whether a check follows a round: all contributors must be in it, also those that missed this round."""
        later = self.schedule.events[round.position + 1 :]
        return any(isinstance(each, Round) and each.kind == "check" for each in later)

    def _sum_over_owners(self, round: Round) -> Total:
        while True:
            try:
                return self._one_session(round)
            except SumAbandoned as abandoned:
                log.warning("%s: opening another session without them", abandoned.message)

    def _one_session(self, round: Round) -> Total:
        """Raises SumAbandoned if another session can be opened without the owners that broke the rules, and FalseTotal
        for a total that honest owners cannot make. Then the same session can be opened again.
        """
        vectors = 1 + (len(self.owners) if round.is_open else 0)  # an owner's own, then everybody's
        self.exchange.begin_step(round.name, round.phase, vectors * round.layout.num_bytes + self.exchange.ahead_bytes)
        reopened = reopen_sum(self.checkpoint, self._kind, lambda request: self._terms(request, round), self.owners)
        request, side = reopened or self._new_sum(round)

        def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message | None]]:
            opening = side.opening()
            if opening is not None:
                self.checkpoint.save_opening(request, opening)
            return self.exchange.ask(requests)

        def exclude(owner: str, violation: RemoteProtocolError) -> None:
            self._keep_evidence(round, request, violation)
            self._exclude(owner, violation)

        try:
            total = drive(side, exchange, exclude)
        except ProvenLie as lie:
            self._keep_evidence(round, request, lie)
            raise
        except SumAbandoned:
            self._exclude_all(side.violations, exclude)
            certify_as_over(self.exchange, self.agreement, self.run, request.session)
            raise
        self.checkpoint.save_total(round, request.session, total, side.uploads_opened())
        self._exclude_all(side.violations, exclude)  # check: who-lied-is-left-out
        return total

    def _exclude_all(
        self, violations: Mapping[str, RemoteProtocolError], exclude: Callable[[str, RemoteProtocolError], None]
    ) -> None:
        for owner, violation in violations.items():
            exclude(owner, violation)

    def _keep_evidence(self, round: Round, request: OpenSum, violation: RemoteProtocolError) -> None:
        """Keep what shows anybody that an owner lied."""
        if isinstance(violation, ProvenLie):  # check: evidence-is-kept
            terms, output = self._terms(request, round), self.checkpoint.folder.parent
            log.warning(
                "who lied, and what proves it: %s", evidence.keep(output, self.agreement, terms, violation.evidence)
            )

    def _exclude(self, owner: str, violation: RemoteProtocolError) -> None:
        """Continue without an owner that broke the rules of a sum, also after a restart. Raises `violation` if too few
        remain.
        """
        self.checkpoint.save_excluded(owner, violation.message)  # check: who-lied-is-remembered
        self.exchange.exclude(owner, violation)

    def _relay_uploads(self, round: Round, total: Total) -> None:
        """Let every owner of an open sum add it up by itself, ahead of the next message. If an owner then finds a model
        wrong, whatever travels that message raises OwnerRefused.
        """
        if not round.is_open:
            return
        uploads = self.checkpoint.uploads_to_relay()
        if uploads is None:
            return
        is_late = bool(self.checkpoint.relayed_to)  # others have gone on since, without those that lack it

        def check(owner: str, reply: Message) -> None:
            if reply != OpeningChecked(session=uploads.session, owner=owner):
                raise RemoteProtocolError(f"owner {owner} did not open the {round.name}")

        def on_arrival() -> None:
            self._check_all_present(round)
            self.checkpoint.uploads_relayed([owner for owner in present if owner in self.owners])

        present = [owner for owner in self.owners if owner in total.owners and owner not in self.checkpoint.relayed_to]
        if is_late:
            self._relay_to_late_owners(uploads, present)
            return
        if len(present) == len(self.owners):
            if not self.exchange.fits_ahead(uploads):
                self.exchange.flush()
            self.exchange.send_ahead(Ahead(message=uploads, check=check, on_arrival=on_arrival))
            return
        for owner, reply in self.exchange.ask(dict.fromkeys(present, uploads)):  # whoever came back has no part in it
            try:
                if reply is not None:
                    check(owner, reply)
            except RemoteProtocolError as violation:
                self.exchange.exclude(owner, violation)
        self.exchange.check_enough()
        on_arrival()

    def _relay_to_late_owners(self, uploads: UploadsOpened, owners: Sequence[str]) -> None:
        """Show a sum to owners that are back. One that helped to open it goes on only once it has added it up. One that
        did not refuses, and goes on without it.
        """
        timeout = self.exchange.reply_timeout_seconds
        for owner, reply in self.exchange.poll(uploads, timeout, owners) if owners else ():
            if reply == OpeningChecked(session=uploads.session, owner=owner):
                self.checkpoint.uploads_relayed([owner])

    # --- checks ---

    def check(self, round: Round) -> None:
        """Let the owners verify what was delivered, while the next round is set up (summation/pairwise.py).

        Three messages travel ahead of its OpenSum, KeyBook and KeyShares, each made of the answers to the one before.
        So what goes wrong here is raised there: TooFewOwners, FalseTotal, or OwnerRefused if an owner finds a model
        wrong.
        """
        total = self.checkpoint.next_total(round)
        keys = self.checkpoint.saved_nonces(round.position)
        if total is not None:
            self._relay_uploads(round, total)
        else:
            vectors = 1 + len(self._contributors)  # an owner's own, then everybody's
            self.exchange.following_bytes = vectors * round.layout.num_bytes
            if keys is not None:
                self._collect_shares(round, keys)
            else:
                self._collect_keys(round)
        self.sums.append(OpenedSum(round, self._contributors))

    def _collect_keys(self, round: Round) -> None:
        keys: list[Nonce] = []

        def take(owner: str, reply: Message) -> None:
            drawn = self._nonce(owner, round.position, reply)
            key_agreement.check_public_key(drawn.nonce)
            keys.append(drawn)

        def on_arrival() -> None:
            self._check_all_present(round)
            self.checkpoint.save_nonces(round.position, Nonce.pack_all(keys))
            self._collect_shares(round, Nonce.pack_all(keys))

        self.exchange.send_ahead(Ahead(message=self._draw(round.position), check=take, on_arrival=on_arrival))

    def _collect_shares(self, round: Round, keys: bytes) -> None:
        joint = PairwiseSum(
            run=self.run,
            position=round.position,
            delivered=deliveries_digest(self.delivered, round.position),
            layout=round.layout,
            roster=self.agreement.roster,
            keys=keys,
        )
        uploads: dict[int, CheckShares] = {}

        def take(owner: str, reply: Message) -> None:
            if not isinstance(reply, CheckShares) or (reply.owner, reply.position) != (owner, round.position):
                raise RemoteProtocolError(f"owner {owner} gave no part of the {round.name}")
            joint.check_upload(owner, reply.payload, reply.signature)
            uploads[self.agreement.owner_names.index(owner)] = reply

        def on_arrival() -> None:
            self._check_all_present(round)
            payload = np.concatenate([uploads[index].payload for index in sorted(uploads)])
            signatures = Signed.pack_all(Signed(index, each.signature) for index, each in uploads.items())
            total = joint.total(payload, signatures)
            _check_zero(round, total)
            opened = UploadsOpened(session=joint.session, proofs=signatures, payload=payload)
            self.checkpoint.save_total(round, joint.session, total, opened)
            self._relay_uploads(round, total)

        request = CheckKeys(
            run=self.run, agreement_digest=self.agreement.digest(), position=round.position, nonces=keys
        )
        self.exchange.send_ahead(Ahead(message=request, check=take, on_arrival=on_arrival))

    def _check_all_present(self, round: Round) -> None:
        """Raise TooFewOwners if a check lacks an owner: shares add up to zero only over all who contributed."""
        missing = [owner for owner in self._contributors if owner not in self.owners]
        if round.kind == "check" and missing:
            raise TooFewOwners(
                f"{some_of(missing)} did not verify the merge; it can only be verified by all who contributed",
                hint=f"bring them back, then {RESUME_HINT}; if they cannot come, make a new agreement without them",
            )

    @property
    def _contributors(self) -> tuple[str, ...]:
        """The owners whose contributions are merged."""
        return next(each.owners for each in self.sums if each.round.kind == "contribution")

    def draw(self, correction: Delivery) -> bytes:
        """A nonce of every owner (records.Nonce), each drawn after the owner had the models that are to be verified."""
        saved = self.checkpoint.saved_nonces(correction.position)
        if saved is not None:
            self.exchange.count_step()
            return saved
        self.exchange.begin_step("random numbers for the check", correction.phase, self.exchange.ahead_bytes)
        nonces = []
        for owner, reply in self.exchange.ask(dict.fromkeys(self.owners, self._draw(correction.position))):
            try:
                if reply is not None:
                    nonces.append(self._nonce(owner, correction.position, reply))
            except RemoteProtocolError as violation:
                self.exchange.exclude(owner, violation)
        self._check_all_present(self.schedule.round_at(correction.position + 1))
        drawn = Nonce.pack_all(nonces)
        self.checkpoint.save_nonces(correction.position, drawn)
        self.exchange.count_step()
        return drawn

    def _draw(self, position: int) -> Draw:
        return Draw(run=self.run, agreement_digest=self.agreement.digest(), position=position)

    def _nonce(self, owner: str, position: int, reply: Message) -> Nonce:
        """Raises RemoteProtocolError for a nonce that the other owners would not accept."""
        if not isinstance(reply, Drawn) or (reply.owner, reply.position) != (owner, position):
            raise RemoteProtocolError(f"owner {owner} drew no nonce")
        nonce = Nonce(self.agreement.owner_names.index(owner), bytes.fromhex(reply.nonce), reply.signature)
        delivered = deliveries_digest(self.delivered, position)
        verify_nonce(
            self.agreement.roster[owner], owner, self.run, position, delivered, nonce
        )  # check: drawn-nonces-are-signed
        return nonce

    def leave_out_absent(self, owners: tuple[str, ...], reason: str) -> None:
        """Go on without those that take part but are not among `owners`."""
        for owner in self.owners:
            if owner not in owners:
                self.exchange.drop(owner, reason)

    def _new_sum(self, round: Round) -> tuple[OpenSum, CoordinatorSide]:
        request = OpenSum(
            run=self.run,
            agreement_digest=self.agreement.digest(),
            round=self._next_round,
            nonce=secrets.token_hex(32),
            position=round.position,
            deliveries_digest=deliveries_digest(self.delivered),
            layout_digest=round.layout.digest(),
        )
        self._next_round += 1
        return request, self._kind.coordinator(self._terms(request, round), self.owners, self.checkpoint.growing)

    def _terms(self, request: OpenSum, round: Round) -> SumTerms:
        return SumTerms(
            request=request,
            layout=round.layout,
            roster=self.agreement.roster,
            needed_owners=self.agreement.needed_owners,
            colluders=self.agreement.colluders,
            is_open=round.is_open,
            all_must_sign=self.agreement.is_verified and round.kind == "contribution",
        )

    @property
    def _kind(self) -> SumKind:
        return SUMMATIONS[self.agreement.summation.kind]

    def destroy(self, round: Round, total: SummedTensors) -> None:
        """Overwrite a total that is no longer needed, and note that this was done."""
        total.destroy()  # check: totals-are-destroyed
        for each in self.sums:
            each.destroyed |= each.round.position == round.position

    # --- deliveries ---

    def deliver(self, delivery: Delivery, vector: NDArray[np.float32], model: str = "", nonces: bytes = b"") -> None:
        """Send every owner `vector`, (delivery.layout.size,); `model` is the name of a candidate, `nonces` are those
        that a correction follows from.

        It travels in parts. Those that fill packets leave at once, the last ones ahead of the next round's OpenSum.
        """
        model = nonces_digest(nonces) if delivery.kind == "correction" else model
        record = SavedDelivery(
            position=delivery.position, model=model, digest=sha256_of(vector), bytes=vector.nbytes, owners=()
        )
        self.delivered.append(record.delivered)
        saved = self._saved_delivery(record.delivered, delivery)
        slices = delivery.layout.part_slices(bytes_per_number=4)

        def part_of(number: int) -> DeliveryPart:
            # A copy, because what waits must not keep the whole vector in memory.
            return self._part(delivery, model, nonces, number, len(slices), vector[slices[number]].copy())

        if saved is not None:
            self._deliver_to_late_owners(delivery, saved, map(part_of, range(len(slices))))
            return
        has_begun = False
        for part in range(len(slices)):
            message = part_of(part)
            if not self.exchange.fits_ahead(message):
                if not has_begun:
                    self.exchange.begin_step(delivery.name, delivery.phase, vector.nbytes)
                    has_begun = True
                self.exchange.flush()
            is_last = part + 1 == len(slices)
            self._send_part(message, delivery, record if is_last else None)

    def _part(
        self, delivery: Delivery, model: str, nonces: bytes, part: int, parts: int, payload: NDArray
    ) -> DeliveryPart:
        fields: dict[str, Any] = {
            "run": self.run,
            "agreement_digest": self.agreement.digest(),
            "position": delivery.position,
            "part": part,
            "parts": parts,
            "payload": payload,
            "signature": self._sign_last_delivery(),
        }
        if delivery.kind == "candidate":
            return CandidatePart(**fields, model=model)
        if delivery.kind == "mixture":
            return MixturePart(**fields, model=model)
        if delivery.kind == "correction":
            return CorrectionPart(**fields | {"payload": packed(payload)}, nonces=nonces)
        return MergedStepPart(**fields) if delivery.kind == "merged_step" else ScalesPart(**fields)

    def _sign_last_delivery(self) -> bytes:
        body = delivery_body(self.agreement.digest(), self.delivered[-1])
        return self.identity.sign(Domain.SIGN_DELIVERY, bytes.fromhex(self.run), body)

    def _send_part(self, message: DeliveryPart, delivery: Delivery, completes: SavedDelivery | None) -> None:
        """Let a part travel ahead of the next message, and save what it `completes` once all owners have it."""

        def on_arrival() -> None:
            if completes is not None:
                self.checkpoint.save_delivery(completes.model_copy(update={"owners": self.owners}))

        def check(owner: str, reply: Message) -> None:
            self._check_part(delivery, message, owner, reply)

        self.exchange.send_ahead(Ahead(message=message, check=check, on_arrival=on_arrival))

    def _check_part(self, delivery: Delivery, message: DeliveryPart, owner: str, reply: Message) -> None:
        expected = PartReceived(run=self.run, owner=owner, position=message.position, part=message.part)
        if reply != expected:  # check: answer-is-about-the-part
            raise RemoteProtocolError(
                f"owner {owner} answered part {message.part} of {delivery.name} with {type(reply).__name__}"
            )

    def _deliver_to_late_owners(self, delivery: Delivery, saved: SavedDelivery, parts: Iterable[DeliveryPart]) -> None:
        """Send what others have had since an earlier start of this run to the owners that are back and lack it."""
        late = [owner for owner in self.owners if owner not in saved.owners]
        if not late:
            return
        self.exchange.begin_step(delivery.name, delivery.phase, saved.bytes)
        self.exchange.flush()
        for message in parts:
            for owner, reply in self.exchange.ask({owner: message for owner in late if owner in self.owners}):
                try:
                    if reply is not None:
                        self._check_part(delivery, message, owner, reply)
                except RemoteProtocolError as violation:
                    self.exchange.exclude(owner, violation)
        self.exchange.check_enough()
        self.checkpoint.delivered_to(saved, [owner for owner in late if owner in self.owners])

    def _saved_delivery(self, delivered: Delivered, delivery: Delivery) -> SavedDelivery | None:
        """What an earlier start of this run sent here, if it did. Raises SettingsError if that was something else."""
        if len(self.delivered) > len(self.checkpoint.deliveries):
            return None
        saved = self.checkpoint.deliveries[len(self.delivered) - 1]
        if saved.delivered != delivered:
            raise SettingsError(
                f"merge: {delivered.model or delivery.name} is not bit-identical to what was sent before the "
                "interruption",
                hint="resume on the same machine and device, with the same number of threads and the same versions",
            )
        return saved

    # --- result ---

    def confirm_result(self, model: str, model_digest: str, publication: bytes) -> PublishedReceipts:
        """Sign what is published, let every owner sign it, and give them everybody's signatures: that ends the run.

        Raises TooFewOwners, or OwnerRefused if an owner finds that it is not what was agreed.
        """
        self.exchange.begin_step("result", "result")
        digest = deliveries_digest(self.delivered)
        body = result_body(self.agreement, model, model_digest, digest, publication)
        result = Result(
            run=self.run,
            model=model,
            model_digest=model_digest,
            deliveries_digest=digest,
            publication=publication,
            signature=self.identity.sign(Domain.SIGN_RESULT, bytes.fromhex(self.run), body),
        )
        self.exchange.send_ahead(
            Ahead(message=result, check=lambda owner, reply: self._keep_receipt(result, owner, reply))
        )
        self.exchange.flush()
        signatures = Signed.pack_all(self._signed)
        self.exchange.ask_all(Receipts(run=self.run, signatures=signatures))  # who drops out here lacks the receipts
        self.exchange.count_step()
        return PublishedReceipts.of(self.agreement, result, signatures)

    def _keep_receipt(self, result: Result, owner: str, reply: Message) -> None:
        if not isinstance(reply, ResultReceived):
            raise RemoteProtocolError(f"owner {owner} answered a Result with {type(reply).__name__}")
        key, body = self.agreement.roster[owner], body_of(self.agreement, result)
        verify(
            key, Domain.SIGN_RECEIPT, bytes.fromhex(self.run), owner, body, reply.signature
        )  # check: receipt-is-signed
        self._signed.append(Signed(self.agreement.owner_names.index(owner), reply.signature))

    def finish(self) -> None:
        """Tell the owners to forget a run that has no result; only name those that do not confirm it."""
        log.info("finish", extra={"about": {"step": "finish"}})
        for owner, reply in self.exchange.poll(Finish(run=self.run), FINISH_TIMEOUT_SECONDS):
            if not isinstance(reply, Finished):
                log.warning("owner %s did not confirm that it has forgotten the run", owner)


def _check_zero(round: Round, total: Total) -> None:
    """Raise FalseTotal for a check that does not add up to zero, before an owner is sent any of it.

    An owner that opened it would take this coordinator's model for a false one, and answer nothing more.
    """
    wrong = wrong_claims(round.claims, total)
    if wrong:  # check: wrong-checks-are-not-relayed
        raise FalseTotal(
            f"merge: the owners' shares of the check of {wrong[0]} do not add up to zero: an owner sent a false share, "
            "and the sum hides who it was. Nothing was published",
            hint="owners contribute once: find out together, then make a new agreement; if this machine may be at "
            "fault, run the same command again",
        )
