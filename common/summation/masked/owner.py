"""One owner in a masked sum."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain_separation import Domain
from common.errors import LocalProtocolError, RemoteProtocolError
from common.identity import Identity
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
from common.summation import key_agreement, mask_stream, secret_sharing
from common.summation.masked.book import (
    DIGEST_BYTES,
    MASK,
    SELF,
    Book,
    index_bytes,
    part_body,
    require,
    shares_body,
    survivors_body,
    upload_digest,
    verify_owner,
)
from common.summation.protocol import (
    RandomBytes,
    SessionOver,
    SumTerms,
    Transitions,
    next_phase,
)
from common.summation.records import KeyEntry, RevealedShare, SealedShare, ShareDelivery, Signed, Survivor

ADVERTISED, SHARED, UPLOADING, UPLOADED, SIGNED, REVEALED = (
    "advertised",
    "shared",
    "uploading",
    "uploaded",
    "signed",
    "revealed",
)


# What each side may receive, and where it leads. An owner is born in ADVERTISED by answering OpenSum.
OWNER_TRANSITIONS: Transitions = {
    (ADVERTISED, KeyBook): SHARED,
    (SHARED, KeyShares): UPLOADING,
    (UPLOADING, PartRequest): UPLOADING,
    (UPLOADED, PartRequest): UPLOADED,
    (UPLOADED, SurvivorList): SIGNED,
    (SIGNED, Acknowledgements): REVEALED,
    (REVEALED, Acknowledgements): REVEALED,
}


@dataclass(frozen=True, kw_only=True)
class MaskedOwner:
    """One owner in one masked sum. Each secret is dropped at the step after which it is not needed."""

    terms: SumTerms
    identity: Identity = field(repr=False)
    phase: str = ADVERTISED
    channel_seed: bytes = field(default=b"", repr=False)  # until KeyShares
    mask_seed: bytes = field(default=b"", repr=False)  # until KeyShares
    self_seed: bytes = field(default=b"", repr=False)  # until KeyShares
    book_data: bytes = b""
    own_shares: bytes = field(default=b"", repr=False)  # until KeyShares, then among `held`
    masks: tuple[mask_stream.Mask, ...] = field(default=(), repr=False)  # from KeyShares until SurvivorList
    held: Mapping[int, bytes] = field(default_factory=dict, repr=False)  # owner -> its two shares, until revealed
    part_digests: tuple[bytes, ...] = ()
    survivors: bytes = b""
    revealed: bytes = b""

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple["MaskedOwner", Message]:
        channel_seed, mask_seed, self_seed = (random_bytes(key_agreement.SEED_BYTES) for _ in range(3))
        state = cls(terms=terms, identity=identity, channel_seed=channel_seed, mask_seed=mask_seed, self_seed=self_seed)
        entry = state._own_entry()
        reply = KeysAdvertised(
            session=terms.request.session,
            owner=identity.name,
            channel_key=entry.channel_key,
            mask_key=entry.mask_key,
            signature=entry.signature,
        )
        return state, reply

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple["MaskedOwner", Message]:
        phase = next_phase(OWNER_TRANSITIONS, self.phase, request, "coordinator")
        require(getattr(request, "session", None) == self.terms.request.session, "sum: this is another session")
        try:
            if isinstance(request, KeyBook):
                state, reply = self._share_keys(request, random_bytes)
            elif isinstance(request, KeyShares):
                state, reply = self._begin_upload(request, encoded)
            elif isinstance(request, PartRequest):
                state, reply = self._upload(request.part, encoded)
            elif isinstance(request, SurvivorList):
                state, reply = self._sign_survivors(request)
            else:
                assert isinstance(request, Acknowledgements)  # the table lets nothing else through
                state, reply = self._reveal(request)
        except RemoteProtocolError as violation:
            raise SessionOver(f"{violation}; this session is over and its secrets are wiped") from violation
        if phase == UPLOADING and len(state.part_digests) == len(state._slices):
            phase = UPLOADED
        return replace(state, phase=phase), reply

    def _share_keys(self, request: KeyBook, random_bytes: RandomBytes) -> tuple["MaskedOwner", Message]:
        book = Book(self.terms, request.entries)
        book.check()
        require(book.entries.get(self._me) == self._own_entry(), "key book: my own entry is missing or altered")
        self._check_enough(len(book.entries), "key book")
        threshold = self.terms.neighbourhood.threshold
        circle = (*book.neighbours[self._me], self._me)  # I keep a share of my own secrets too
        points = [owner + 1 for owner in circle]
        self_shares = secret_sharing.split(self.self_seed, threshold, points, random_bytes)
        mask_shares = secret_sharing.split(self.mask_seed, threshold, points, random_bytes)
        sealed = {}
        for other in book.neighbours[self._me]:
            key = book.seal_key(self.channel_seed, self._me, other, self._me)
            plain = index_bytes(other) + self_shares[other + 1] + mask_shares[other + 1]
            sealed[other] = key_agreement.seal(key, plain, book.associated_data(self._me, other))
        commitment = book.commitment(self._me, self.self_seed)
        manifest = b"".join(hashlib.sha256(sealed[other]).digest() for other in sorted(sealed))
        reply = SharesSealed(
            session=request.session,
            owner=self.identity.name,
            commitment=commitment,
            shares=SealedShare.pack_all(SealedShare(other, each) for other, each in sealed.items()),
            signature=self._sign(Domain.SIGN_SHARES, shares_body(book, commitment, manifest)),
        )
        own = self_shares[self._me + 1] + mask_shares[self._me + 1]
        return replace(self, book_data=request.entries, own_shares=own), reply

    def _begin_upload(self, request: KeyShares, encoded: NDArray) -> tuple["MaskedOwner", Message]:
        book = self._book
        deliveries = ShareDelivery.unpack_all(request.deliveries)
        senders = [delivery.owner for delivery in deliveries]
        require(set(senders) <= set(book.neighbours[self._me]), "key shares: a sender is no neighbour of mine")
        self._check_neighbourhood(len(senders) + 1)
        held = {self._me: self.own_shares}
        rest = request.manifests
        for delivery in deliveries:
            length = DIGEST_BYTES * len(book.neighbours[delivery.owner])
            manifest, rest = rest[:length], rest[length:]
            held[delivery.owner] = self._open_share(book, delivery, manifest)
        require(rest == b"", "key shares: there are manifests of nobody")
        masks = [*book.pair_masks(self.mask_seed, self._me, senders), (book.self_mask(self.self_seed), 1)]
        state = replace(
            self, held=held, masks=tuple(masks), channel_seed=b"", mask_seed=b"", self_seed=b"", own_shares=b""
        )
        return state._upload(0, encoded)

    def _open_share(self, book: Book, delivery: ShareDelivery, manifest: bytes) -> bytes:
        """The two shares that `delivery` brings."""
        sender = delivery.owner
        place = DIGEST_BYTES * book.neighbours[sender].index(self._me)
        named = manifest[place : place + DIGEST_BYTES]
        require(hashlib.sha256(delivery.sealed).digest() == named, "key shares: a share is not the one that was sent")
        body = shares_body(book, delivery.commitment, manifest)
        verify_owner(self.terms, sender, Domain.SIGN_SHARES, body, delivery.signature)
        key = book.seal_key(self.channel_seed, sender, self._me, self._me)
        plain = key_agreement.open_sealed(key, delivery.sealed, book.associated_data(sender, self._me))
        require(plain[:2] == index_bytes(self._me), "key shares: a share is at another owner's point")
        shares = plain[2:]
        for share in _two_shares(shares):
            secret_sharing.read_share(share)
        return shares

    def _upload(self, part: int, encoded: NDArray) -> tuple["MaskedOwner", Message]:
        require(part <= len(self.part_digests) and part < len(self._slices), f"sum: part {part} is not the next one")
        position = self._slices[part]
        payload = np.array(encoded[position], dtype=self.terms.layout.dtype)
        mask_stream.add_masks(payload, self.masks, position.start)
        digest = hashlib.sha256(payload.data).digest()
        # Asked for again after somebody was lost: the same bytes, or nothing.
        sent_before = part < len(self.part_digests)
        if sent_before and self.part_digests[part] != digest:
            raise LocalProtocolError(f"sum: the vector has changed since part {part} was sent; nothing more leaves")
        reply = MaskedPart(
            session=self.terms.request.session,
            owner=self.identity.name,
            part=part,
            payload=payload,
            signature=self._sign(Domain.SIGN_PART, part_body(part, digest)),
        )
        digests = self.part_digests if sent_before else (*self.part_digests, digest)
        return replace(self, part_digests=digests), reply

    def _sign_survivors(self, request: SurvivorList) -> tuple["MaskedOwner", Message]:
        survivors = {each.owner: each.upload for each in Survivor.unpack_all(request.survivors)}
        strangers = set(survivors) - set(self._book.entries)
        silent = (set(survivors) & set(self._book.neighbours[self._me])) - set(self.held)
        require(not strangers and not silent, "survivors: somebody is listed who shared no keys")
        mine = upload_digest(self.terms, self.part_digests)
        require(survivors.get(self._me) == mine, "survivors: my upload is missing or altered")
        self._check_enough(len(survivors), "survivors")
        reply = SurvivorsSigned(
            session=request.session,
            owner=self.identity.name,
            signature=self._sign(Domain.SIGN_SURVIVORS, survivors_body(self.terms, request.survivors)),
        )
        return replace(self, survivors=request.survivors, masks=()), reply

    def _reveal(self, request: Acknowledgements) -> tuple["MaskedOwner", Message]:
        survivors = {each.owner for each in Survivor.unpack_all(self.survivors)}
        signed = Signed.unpack_all(request.signatures)
        body = survivors_body(self.terms, self.survivors)
        for each in signed:
            require(each.owner in survivors, "acknowledgements: somebody signed who is no survivor")
            verify_owner(self.terms, each.owner, Domain.SIGN_SURVIVORS, body, each.signature)
        require(
            len(signed) >= self.terms.quorum,
            f"acknowledgements: {len(signed)} signed the survivor list, a quorum is {self.terms.quorum}",
        )
        revealed = self.revealed or self._shares_for(survivors)
        reply = SharesRevealed(
            session=request.session,
            owner=self.identity.name,
            shares=revealed,
            signature=self._sign(Domain.SIGN_REVEAL, hashlib.sha256(revealed).digest()),
        )
        return replace(self, held={}, revealed=revealed), reply

    def _shares_for(self, survivors: set[int]) -> bytes:
        """Of each owner one of its two secrets, never both."""
        shares = []
        for owner, both in self.held.items():
            self_share, mask_share = _two_shares(both)
            shares.append(
                RevealedShare(owner, SELF, self_share) if owner in survivors else RevealedShare(owner, MASK, mask_share)
            )
        return RevealedShare.pack_all(shares)

    def _check_enough(self, count: int, what: str) -> None:
        needed = max(self.terms.quorum, self.terms.needed_owners)
        require(count >= needed, f"{what}: {count} owners, the agreement needs {needed}")

    def _check_neighbourhood(self, count: int) -> None:
        """In the complete graph the neighbourhood is everybody; in a sparse one, the survivor list is counted."""
        if self.terms.neighbourhood.degree == len(self.terms.roster) - 1:
            self._check_enough(count, "key shares")
        threshold = self.terms.neighbourhood.threshold
        require(count >= threshold, f"key shares: {count} of my neighbourhood sent shares, {threshold} are needed")

    def _own_entry(self) -> KeyEntry:
        session = self.terms.session
        channel_key = key_agreement.public_key(self.channel_seed, Domain.CHANNEL_KEY, session)
        mask_key = key_agreement.public_key(self.mask_seed, Domain.MASK_KEY, session)
        return KeyEntry(self._me, channel_key, mask_key, self._sign(Domain.SIGN_KEYS, channel_key + mask_key))

    def _sign(self, label: Domain, body: bytes) -> bytes:
        return self.identity.sign(label, self.terms.session, body)

    @property
    def _me(self) -> int:
        return self.terms.places[self.identity.name]

    @property
    def _book(self) -> Book:
        return Book(self.terms, self.book_data)

    @property
    def _slices(self) -> list[slice]:
        return self.terms.layout.part_slices(self.terms.layout.dtype.itemsize)

    @property
    def offers(self) -> bool:
        return bool(self.part_digests)

    @property
    def reveals(self) -> bool:
        return self.phase == REVEALED

    @property
    def is_complete(self) -> bool:
        return self.phase == REVEALED

    @property
    def is_done(self) -> bool:
        return self.phase in (SIGNED, REVEALED)

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "channel_seed": self.channel_seed.hex(),
            "mask_seed": self.mask_seed.hex(),
            "self_seed": self.self_seed.hex(),
            "book_data": self.book_data.hex(),
            "own_shares": self.own_shares.hex(),
            "masks": [[key.hex(), sign] for key, sign in self.masks],
            "held": {str(owner): shares.hex() for owner, shares in self.held.items()},
            "part_digests": [digest.hex() for digest in self.part_digests],
            "survivors": self.survivors.hex(),
            "revealed": self.revealed.hex(),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> "MaskedOwner":
        return cls(
            terms=terms,
            identity=identity,
            phase=state["phase"],
            channel_seed=bytes.fromhex(state["channel_seed"]),
            mask_seed=bytes.fromhex(state["mask_seed"]),
            self_seed=bytes.fromhex(state["self_seed"]),
            book_data=bytes.fromhex(state["book_data"]),
            own_shares=bytes.fromhex(state["own_shares"]),
            masks=tuple((bytes.fromhex(key), sign) for key, sign in state["masks"]),
            held={int(owner): bytes.fromhex(shares) for owner, shares in state["held"].items()},
            part_digests=tuple(bytes.fromhex(digest) for digest in state["part_digests"]),
            survivors=bytes.fromhex(state["survivors"]),
            revealed=bytes.fromhex(state["revealed"]),
        )


def _two_shares(both: bytes) -> tuple[bytes, bytes]:
    """(of the self-mask seed, of the mask-key seed)"""
    return both[: secret_sharing.SHARE_BYTES], both[secret_sharing.SHARE_BYTES :]
