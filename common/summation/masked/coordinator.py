"""The coordinator in a masked sum."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice

import numpy as np

from common.domain_separation import Domain
from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.messages import (
    Acknowledgements,
    KeyBook,
    KeysAdvertised,
    KeyShares,
    MaskedPart,
    Message,
    PartRequest,
    SharesRevealed,
    SharesSealed,
    SurvivorList,
    SurvivorsSigned,
)
from common.summation import fixed_point, key_agreement, mask_stream, secret_sharing
from common.summation.accumulator import Accumulator, Zeros, zeros_in_memory
from common.summation.masked.book import (
    MASK,
    SELF,
    Book,
    check_entry,
    part_body,
    require,
    shares_body,
    survivors_body,
    upload_digest,
    verify_owner,
)
from common.summation.masked.owner import UPLOADING
from common.summation.protocol import (
    Opening,
    SumTerms,
    Total,
    Transitions,
    check_enough,
    next_phase,
)
from common.summation.records import KeyEntry, RevealedShare, SealedShare, ShareDelivery, Signed, Survivor

OPEN, SHARING, SURVIVING, REVEALING, DONE = "open", "sharing", "surviving", "revealing", "done"


COORDINATOR_TRANSITIONS: Transitions = {
    (OPEN, KeysAdvertised): OPEN,
    (SHARING, SharesSealed): SHARING,
    (UPLOADING, MaskedPart): UPLOADING,
    (SURVIVING, SurvivorsSigned): SURVIVING,
    (REVEALING, SharesRevealed): REVEALING,
}


MAX_SHARE_SUBSETS = 2000  # how many groups of shares the coordinator tries where somebody revealed a wrong one


@dataclass(frozen=True)
class Sealed:
    """What one owner sent to its neighbours."""

    commitment: bytes
    shares: Mapping[int, bytes]
    manifest: bytes
    signature: bytes


class MaskedCoordinator:
    """The coordinator in one masked sum. It checks what owners send, so that none can spoil the others' sum."""

    def __init__(self, terms: SumTerms, participants: tuple[str, ...], zeros: Zeros = zeros_in_memory) -> None:
        check_enough(len(participants), terms, "open", {})
        self._terms = terms
        self._remaining = set(participants)
        self._phase = OPEN
        self._waiting: set[str] = set()
        self._last_heard: dict[str, str] = {}
        self._entries: dict[int, KeyEntry] = {}
        self._book = Book(terms, b"")
        self._sealed: dict[int, Sealed] = {}
        self._accumulator = Accumulator(terms.layout, zeros)
        self._first_upload = True
        self._part_digests: dict[int, dict[int, bytes]] = {}
        self._survivors = b""
        self._signed: dict[int, bytes] = {}
        self._revealed: dict[tuple[int, bytes], dict[int, bytes]] = {}  # (owner, kind) -> point -> share

    # --- the flow ---

    def requests(self) -> Mapping[str, Message]:
        if self._phase == DONE:
            return {}
        self._waiting = set(self._remaining)
        in_order = [name for name in self._terms.names if name in self._waiting]
        return {name: self._request(self._terms.places[name]) for name in in_order}

    def _request(self, place: int) -> Message:
        session = self._terms.request.session
        if self._phase == OPEN:
            return self._terms.request
        if self._phase == SHARING:
            return KeyBook(session=session, entries=self._book.data)
        if self._phase == UPLOADING and self._first_upload:
            return self._key_shares(place)
        if self._phase == UPLOADING:
            return PartRequest(session=session, part=self._accumulator.part)
        if self._phase == SURVIVING:
            return SurvivorList(session=session, survivors=self._survivors)
        signed = Signed.pack_all(Signed(owner, signature) for owner, signature in self._signed.items())
        return Acknowledgements(session=session, signatures=signed)

    def _key_shares(self, recipient: int) -> KeyShares:
        deliveries, manifests = [], []
        for sender in self._book.neighbours[recipient]:
            if sender in self._sealed:
                sealed = self._sealed[sender]
                share = sealed.shares[recipient]
                deliveries.append(ShareDelivery(sender, sealed.commitment, share, sealed.signature))
                manifests.append(sealed.manifest)
        return KeyShares(
            session=self._terms.request.session,
            deliveries=ShareDelivery.pack_all(deliveries),
            manifests=b"".join(manifests),
        )

    def receive(self, owner: str, reply: Message) -> None:
        next_phase(COORDINATOR_TRANSITIONS, self._phase, reply, f"owner {owner}")
        require(owner in self._waiting, f"sum: owner {owner} answered twice, or was not asked")
        assert isinstance(reply, (KeysAdvertised, SharesSealed, MaskedPart, SurvivorsSigned, SharesRevealed))
        same = reply.owner == owner and reply.session == self._terms.request.session
        require(same, f"sum: owner {owner} answered for another owner or session")
        place = self._terms.places[owner]
        if isinstance(reply, KeysAdvertised):
            entry = KeyEntry(place, reply.channel_key, reply.mask_key, reply.signature)
            check_entry(self._terms, entry)
            for key in (entry.channel_key, entry.mask_key):
                key_agreement.check_public_key(key)
            self._entries[place] = entry
        elif isinstance(reply, SharesSealed):
            self._take_shares(place, reply)
        elif isinstance(reply, MaskedPart):
            self._fold(place, reply)
        elif isinstance(reply, SurvivorsSigned):
            body = survivors_body(self._terms, self._survivors)
            verify_owner(self._terms, place, Domain.SIGN_SURVIVORS, body, reply.signature)
            self._signed[place] = reply.signature
        else:
            self._take_revealed(place, reply)
        self._waiting.remove(owner)
        self._last_heard[owner] = self._step

    def lose(self, owner: str) -> None:
        self._remaining.discard(owner)
        self._waiting.discard(owner)
        if self._phase == UPLOADING:
            self._accumulator.lose_owner()

    def end_step(self) -> None:
        if self._waiting:
            raise LocalProtocolError(f"sum: step ended while waiting for {', '.join(sorted(self._waiting))}")
        gone = {name: self._last_heard.get(name, "never") for name in self._terms.names if name not in self._remaining}
        check_enough(len(self._remaining), self._terms, self._step, gone)
        if self._phase == OPEN:
            self._book = Book(self._terms, KeyEntry.pack_all(self._entries.values()))
            self._phase = SHARING
        elif self._phase == SHARING:
            self._phase = UPLOADING
        elif self._phase == UPLOADING:
            self._first_upload = False
            if not self._accumulator.advance():
                self._survivors = Survivor.pack_all(self._survivor_records())
                self._phase = SURVIVING
        elif self._phase == SURVIVING:
            self._phase = REVEALING
        else:
            self._unmask()
            self._phase = DONE

    @property
    def _step(self) -> str:
        return f"{self._phase} part {self._accumulator.part}" if self._phase == UPLOADING else self._phase

    def total(self) -> Total:
        if self._phase != DONE:
            raise LocalProtocolError(f"sum: the total was asked for in phase {self._phase}")
        owners = tuple(self._terms.names[each.owner] for each in Survivor.unpack_all(self._survivors))
        vector = fixed_point.decode(self._terms.layout, self._accumulator.words, len(self._terms.roster), len(owners))
        return Total(layout=self._terms.layout, vector=vector, owners=owners, roster_size=len(self._terms.roster))

    # --- across a restart ---

    def opening(self) -> Opening | None:
        if self._phase != REVEALING:
            return None
        state = {
            "remaining": sorted(self._remaining),
            "book": self._book.data.hex(),
            "commitments": {str(place): sealed.commitment.hex() for place, sealed in self._sealed.items()},
            "survivors": self._survivors.hex(),
            "signed": {str(place): signature.hex() for place, signature in self._signed.items()},
        }
        return Opening(state, self._accumulator.words)

    @classmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> "MaskedCoordinator":
        state = opening.state
        side = cls(terms, tuple(state["remaining"]), lambda _: opening.words)
        side._phase = REVEALING
        side._book = Book(terms, bytes.fromhex(state["book"]))
        side._sealed = {
            int(place): Sealed(bytes.fromhex(commitment), {}, b"", b"")
            for place, commitment in state["commitments"].items()
        }
        side._survivors = bytes.fromhex(state["survivors"])
        side._signed = {int(place): bytes.fromhex(signature) for place, signature in state["signed"].items()}
        return side

    # --- what arrives ---

    def _take_shares(self, place: int, reply: SharesSealed) -> None:
        shares = SealedShare.unpack_all(reply.shares)
        recipients = tuple(share.owner for share in shares)
        require(recipients == self._book.neighbours[place], "key shares: not one for each neighbour")
        manifest = b"".join(hashlib.sha256(share.sealed).digest() for share in shares)
        body = shares_body(self._book, reply.commitment, manifest)
        verify_owner(self._terms, place, Domain.SIGN_SHARES, body, reply.signature)
        by_recipient = {share.owner: share.sealed for share in shares}
        self._sealed[place] = Sealed(reply.commitment, by_recipient, manifest, reply.signature)

    def _fold(self, place: int, reply: MaskedPart) -> None:
        digest = hashlib.sha256(np.ascontiguousarray(reply.payload).data).digest()
        verify_owner(self._terms, place, Domain.SIGN_PART, part_body(reply.part, digest), reply.signature)
        before = self._part_digests.setdefault(place, {}).get(reply.part, digest)
        require(before == digest, f"sum: part {reply.part} is another than the one that was sent before")
        self._accumulator.fold(reply.owner, reply.part, reply.payload)
        self._part_digests[place][reply.part] = digest

    def _survivor_records(self) -> list[Survivor]:
        records = []
        for name in self._remaining:
            place = self._terms.places[name]
            digests = [self._part_digests[place][part] for part in sorted(self._part_digests[place])]
            records.append(Survivor(place, upload_digest(self._terms, digests)))
        return records

    def _take_revealed(self, place: int, reply: SharesRevealed) -> None:
        digest = hashlib.sha256(reply.shares).digest()
        verify_owner(self._terms, place, Domain.SIGN_REVEAL, digest, reply.signature)
        records = RevealedShare.unpack_all(reply.shares)
        survivors = {each.owner for each in Survivor.unpack_all(self._survivors)}
        circle = {*self._book.neighbours[place], place} & set(self._sealed)
        require({record.owner for record in records} == circle, "reveal: not one share for each neighbour")
        for record in records:
            require(record.kind == (SELF if record.owner in survivors else MASK), "reveal: a share of the wrong kind")
            secret_sharing.read_share(record.share)
        for record in records:
            self._revealed.setdefault((record.owner, record.kind), {})[place + 1] = record.share

    # --- the end ---

    def _unmask(self) -> None:
        """Take off the survivors' self masks, and the pair masks that the lost owners' absence left behind."""
        survivors = {each.owner for each in Survivor.unpack_all(self._survivors)}
        masks: list[mask_stream.Mask] = []
        for owner in self._sealed:
            if owner in survivors:
                masks.append((self._book.self_mask(self._rebuild_self_seed(owner)), -1))
            else:
                # The survivors hold the other end of each pair, with the sign turned: adding the lost owner's cancels.
                others = [other for other in self._book.neighbours[owner] if other in survivors]
                masks += self._book.pair_masks(self._rebuild_mask_seed(owner), owner, others)
        mask_stream.add_masks(self._accumulator.vector, masks, 0)

    def _rebuild_self_seed(self, owner: int) -> bytes:
        commitment = self._sealed[owner].commitment
        return self._rebuild(owner, SELF, lambda seed: self._book.commitment(owner, seed) == commitment)

    def _rebuild_mask_seed(self, owner: int) -> bytes:
        advertised, session = self._book.entries[owner].mask_key, self._terms.session
        return self._rebuild(
            owner, MASK, lambda seed: key_agreement.public_key(seed, Domain.MASK_KEY, session) == advertised
        )

    def _rebuild(self, owner: int, kind: bytes, fits: Callable[[bytes], bool]) -> bytes:
        """An owner's secret from the revealed shares; a group with a wrong share among them is passed over."""
        shares, threshold = self._revealed.get((owner, kind), {}), self._terms.neighbourhood.threshold
        name = self._terms.names[owner]
        if len(shares) < threshold:
            raise TooFewOwners(
                f"{len(shares)} of {name}'s neighbours revealed a share, {threshold} are needed; "
                "no total was computed. Bring the others back and run again"
            )
        for points in islice(combinations(sorted(shares), threshold), MAX_SHARE_SUBSETS):
            try:
                seed = secret_sharing.reconstruct(shares, _coefficients(points))
            except RemoteProtocolError:
                continue
            if fits(seed):
                return seed
        raise RemoteProtocolError(f"reveal: the shares of {name}'s secret do not fit what it committed to")


@lru_cache(maxsize=1000)
def _coefficients(points: tuple[int, ...]) -> dict[int, int]:
    """One set for all the secrets that the same owners reveal."""
    return secret_sharing.coefficients_at_zero(points)
