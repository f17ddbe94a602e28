"""The masked sum: the coordinator learns the total over the owners, and nothing else, even if it cheats.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), figure 4, the variant against an active server; above 150 owners
with the sparse graph of Bell et al., CCS 2020 (neighbours.py). Run by owners and coordinator. The owners' long-lived
keys are pinned in the agreement; threshold, roster, bounds and layout come from it too, never from a message.

    step          coordinator         owner             what the owner checks first (or it wipes its secrets: burned)
    advertise     OpenSum             KeysAdvertised    (client/owner.py: agreement, layout, round, ledger)
    share keys    KeyBook             SharesSealed      pinned signatures, own entry, distinct keys, enough owners
    masked part   KeyShares           MaskedPart 0      senders in the book, their signatures, seals, enough senders
                  PartRequest         MaskedPart k      the part is the next one, or the very bytes sent before
    survivors     SurvivorList        SurvivorsSigned   subset of the book, I am in it with my upload, enough of them
    reveal        Acknowledgements    SharesRevealed    a quorum signed the very list that I signed; asked again, by a
                                                        coordinator that was started again: the very bytes sent before

Owner i sends y_i = x_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij), modulo 2^64 or 2^32.
The pair masks PRG(s_ij) cancel in the sum over owners. The self mask PRG(b_i) keeps y_i hidden when i is declared lost
although its upload arrived: then the neighbours help to rebuild s_i*, never b_i. For an owner that survived they help
to rebuild b_i, never s_i*. Both for one owner would open x_i, so no honest owner signs two survivor lists in one
session, and none reveals anything before a quorum t = floor((N + c) / 2) + 1 has signed its own list: two quorums share
an honest owner. Every sum is a session of its own with fresh keys; a method of several steps runs one session per step,
because keys that live on across steps would have to be kept while nobody knows yet who will survive the next one.

What this does not protect: what the sum itself reveals; an owner whose vector is a lie; an owner, or the coordinator,
refusing to go on; anything if more than c owners collude with the coordinator. See SECURITY.md.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.identity import Identity, verify
from common.labels import Label
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
from common.summation.neighbours import NeighbourGraph
from common.summation.protocol import (
    Opening,
    RandomBytes,
    SessionOver,
    SumTerms,
    Total,
    Transitions,
    check_enough,
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
OPEN, SHARING, SURVIVING, REVEALING, DONE = "open", "sharing", "surviving", "revealing", "done"

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
COORDINATOR_TRANSITIONS: Transitions = {
    (OPEN, KeysAdvertised): OPEN,
    (SHARING, SharesSealed): SHARING,
    (UPLOADING, MaskedPart): UPLOADING,
    (SURVIVING, SurvivorsSigned): SURVIVING,
    (REVEALING, SharesRevealed): REVEALING,
}

SELF, MASK = b"s", b"m"  # which of an owner's two secrets a revealed share belongs to
DIGEST_BYTES = 32
MAX_SHARE_SUBSETS = 2000  # how many groups of shares the coordinator tries where somebody revealed a wrong one


# --- what both sides compute alike ---


@dataclass(frozen=True)
class Book:
    """The key book of one session: who takes part with which keys, and who is whose neighbour."""

    terms: SumTerms
    data: bytes  # KeyEntry.pack_all

    @cached_property
    def entries(self) -> dict[int, KeyEntry]:
        return {entry.owner: entry for entry in KeyEntry.unpack_all(self.data)}

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(Label.KEY_BOOK.value + self.terms.session + self.data).digest()

    @cached_property
    def neighbours(self) -> NeighbourGraph:
        return NeighbourGraph(self.digest, list(self.entries), self.terms.neighbourhood.degree)

    def check(self) -> None:
        """Signatures under the pinned keys, and no key twice. Raises RemoteProtocolError.

        A weak key shows as soon as it is used, in `seal_key` or `pair_masks`.
        """
        keys = [key for entry in self.entries.values() for key in (entry.channel_key, entry.mask_key)]
        if len(set(keys)) != len(keys):
            raise RemoteProtocolError("key book: a key stands in it twice")
        for entry in self.entries.values():
            check_entry(self.terms, entry)

    def seal_key(self, private_seed: bytes, sender: int, recipient: int, me: int) -> bytes:
        """The key for what `sender` seals to `recipient`; `private_seed` is the channel seed of `me`, one of them."""
        other = self.entries[recipient if me == sender else sender].channel_key
        private = key_agreement.private_key(private_seed, Label.CHANNEL_KEY, self.terms.session)
        shared = key_agreement.agree(private, other)
        return key_agreement.derive(shared, Label.SEAL_KEY, self.digest, _direction(sender, recipient))

    def pair_masks(self, mask_seed: bytes, me: int, others: Sequence[int]) -> list[mask_stream.Mask]:
        """The masks that `me` has in common with each of `others`; the owner earlier on the roster adds."""
        private = key_agreement.private_key(mask_seed, Label.MASK_KEY, self.terms.session)
        return [(self._pair_key(private, me, other), 1 if me < other else -1) for other in others]

    def _pair_key(self, private: Any, me: int, other: int) -> bytes:
        shared = key_agreement.agree(private, self.entries[other].mask_key)
        pair = _direction(min(me, other), max(me, other))
        return key_agreement.derive(shared, Label.PAIR_MASK, self.digest, pair, mask_stream.KEY_BYTES)

    def self_mask(self, self_seed: bytes) -> bytes:
        return key_agreement.derive(self_seed, Label.SELF_MASK, self.digest, length=mask_stream.KEY_BYTES)

    def commitment(self, owner: int, self_seed: bytes) -> bytes:
        return hashlib.sha256(Label.SEED_COMMITMENT.value + self.digest + _place(owner) + self_seed).digest()

    def associated_data(self, sender: int, recipient: int) -> bytes:
        return self.digest + _direction(sender, recipient)


def check_entry(terms: SumTerms, entry: KeyEntry) -> None:
    """One owner's line of the key book: signed under its pinned key, for this session."""
    _verify(terms, entry.owner, Label.SIGN_KEYS, entry.channel_key + entry.mask_key, entry.signature)


def upload_digest(terms: SumTerms, part_digests: Sequence[bytes]) -> bytes:
    return hashlib.sha256(Label.UPLOAD.value + terms.session + b"".join(part_digests)).digest()


def _survivors_body(terms: SumTerms, survivors: bytes) -> bytes:
    return hashlib.sha256(Label.SURVIVORS.value + terms.session + survivors).digest()


def _shares_body(book: Book, commitment: bytes, manifest: bytes) -> bytes:
    return book.digest + commitment + manifest


def _part_body(part: int, digest: bytes) -> bytes:
    return part.to_bytes(4) + digest


def _verify(terms: SumTerms, place: int, label: Label, body: bytes, signature: bytes) -> None:
    name = terms.name_of(place)
    verify(terms.roster[name], label, terms.session, name, body, signature)


def _place(owner: int) -> bytes:
    return owner.to_bytes(2)


def _direction(sender: int, recipient: int) -> bytes:
    return _place(sender) + _place(recipient)


def _require(condition: bool, violation: str) -> None:
    if not condition:
        raise RemoteProtocolError(violation)


# --- one owner ---


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
        _require(getattr(request, "session", None) == self.terms.request.session, "sum: this is another session")
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
        _require(book.entries.get(self._me) == self._own_entry(), "key book: my own entry is missing or altered")
        self._check_enough(len(book.entries), "key book")
        threshold = self.terms.neighbourhood.threshold
        circle = (*book.neighbours[self._me], self._me)  # I keep a share of my own secrets too
        points = [owner + 1 for owner in circle]
        self_shares = secret_sharing.split(self.self_seed, threshold, points, random_bytes)
        mask_shares = secret_sharing.split(self.mask_seed, threshold, points, random_bytes)
        sealed = {}
        for other in book.neighbours[self._me]:
            key = book.seal_key(self.channel_seed, self._me, other, self._me)
            plain = _place(other) + self_shares[other + 1] + mask_shares[other + 1]
            sealed[other] = key_agreement.seal(key, plain, book.associated_data(self._me, other))
        commitment = book.commitment(self._me, self.self_seed)
        manifest = b"".join(hashlib.sha256(sealed[other]).digest() for other in sorted(sealed))
        reply = SharesSealed(
            session=request.session,
            owner=self.identity.name,
            commitment=commitment,
            shares=SealedShare.pack_all(SealedShare(other, each) for other, each in sealed.items()),
            signature=self._sign(Label.SIGN_SHARES, _shares_body(book, commitment, manifest)),
        )
        own = self_shares[self._me + 1] + mask_shares[self._me + 1]
        return replace(self, book_data=request.entries, own_shares=own), reply

    def _begin_upload(self, request: KeyShares, encoded: NDArray) -> tuple["MaskedOwner", Message]:
        book = self._book
        deliveries = ShareDelivery.unpack_all(request.deliveries)
        senders = [delivery.owner for delivery in deliveries]
        _require(set(senders) <= set(book.neighbours[self._me]), "key shares: a sender is no neighbour of mine")
        self._check_neighbourhood(len(senders) + 1)
        held = {self._me: self.own_shares}
        rest = request.manifests
        for delivery in deliveries:
            length = DIGEST_BYTES * len(book.neighbours[delivery.owner])
            manifest, rest = rest[:length], rest[length:]
            held[delivery.owner] = self._open_share(book, delivery, manifest)
        _require(rest == b"", "key shares: there are manifests of nobody")
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
        _require(hashlib.sha256(delivery.sealed).digest() == named, "key shares: a share is not the one that was sent")
        body = _shares_body(book, delivery.commitment, manifest)
        _verify(self.terms, sender, Label.SIGN_SHARES, body, delivery.signature)
        key = book.seal_key(self.channel_seed, sender, self._me, self._me)
        plain = key_agreement.open_sealed(key, delivery.sealed, book.associated_data(sender, self._me))
        _require(plain[:2] == _place(self._me), "key shares: a share is at another owner's point")
        shares = plain[2:]
        for share in _two_shares(shares):
            secret_sharing.read_share(share)
        return shares

    def _upload(self, part: int, encoded: NDArray) -> tuple["MaskedOwner", Message]:
        _require(part <= len(self.part_digests) and part < len(self._slices), f"sum: part {part} is not the next one")
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
            signature=self._sign(Label.SIGN_PART, _part_body(part, digest)),
        )
        digests = self.part_digests if sent_before else (*self.part_digests, digest)
        return replace(self, part_digests=digests), reply

    def _sign_survivors(self, request: SurvivorList) -> tuple["MaskedOwner", Message]:
        survivors = {each.owner: each.upload for each in Survivor.unpack_all(request.survivors)}
        strangers = set(survivors) - set(self._book.entries)
        silent = (set(survivors) & set(self._book.neighbours[self._me])) - set(self.held)
        _require(not strangers and not silent, "survivors: somebody is listed who shared no keys")
        mine = upload_digest(self.terms, self.part_digests)
        _require(survivors.get(self._me) == mine, "survivors: my upload is missing or altered")
        self._check_enough(len(survivors), "survivors")
        reply = SurvivorsSigned(
            session=request.session,
            owner=self.identity.name,
            signature=self._sign(Label.SIGN_SURVIVORS, _survivors_body(self.terms, request.survivors)),
        )
        return replace(self, survivors=request.survivors, masks=()), reply

    def _reveal(self, request: Acknowledgements) -> tuple["MaskedOwner", Message]:
        survivors = {each.owner for each in Survivor.unpack_all(self.survivors)}
        signed = Signed.unpack_all(request.signatures)
        body = _survivors_body(self.terms, self.survivors)
        for each in signed:
            _require(each.owner in survivors, "acknowledgements: somebody signed who is no survivor")
            _verify(self.terms, each.owner, Label.SIGN_SURVIVORS, body, each.signature)
        _require(
            len(signed) >= self.terms.quorum,
            f"acknowledgements: {len(signed)} signed the survivor list, a quorum is {self.terms.quorum}",
        )
        revealed = self.revealed or self._shares_for(survivors)
        reply = SharesRevealed(
            session=request.session,
            owner=self.identity.name,
            shares=revealed,
            signature=self._sign(Label.SIGN_REVEAL, hashlib.sha256(revealed).digest()),
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
        _require(count >= needed, f"{what}: {count} owners, the agreement needs {needed}")

    def _check_neighbourhood(self, count: int) -> None:
        """In the complete graph the neighbourhood is everybody; in a sparse one, the survivor list is counted."""
        if self.terms.neighbourhood.degree == len(self.terms.roster) - 1:
            self._check_enough(count, "key shares")
        threshold = self.terms.neighbourhood.threshold
        _require(count >= threshold, f"key shares: {count} of my neighbourhood sent shares, {threshold} are needed")

    def _own_entry(self) -> KeyEntry:
        session = self.terms.session
        channel_key = key_agreement.public_key(self.channel_seed, Label.CHANNEL_KEY, session)
        mask_key = key_agreement.public_key(self.mask_seed, Label.MASK_KEY, session)
        return KeyEntry(self._me, channel_key, mask_key, self._sign(Label.SIGN_KEYS, channel_key + mask_key))

    def _sign(self, label: Label, body: bytes) -> bytes:
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


# --- the coordinator ---


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
        _require(owner in self._waiting, f"sum: owner {owner} answered twice, or was not asked")
        assert isinstance(reply, (KeysAdvertised, SharesSealed, MaskedPart, SurvivorsSigned, SharesRevealed))
        same = reply.owner == owner and reply.session == self._terms.request.session
        _require(same, f"sum: owner {owner} answered for another owner or session")
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
            body = _survivors_body(self._terms, self._survivors)
            _verify(self._terms, place, Label.SIGN_SURVIVORS, body, reply.signature)
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
        _require(recipients == self._book.neighbours[place], "key shares: not one for each neighbour")
        manifest = b"".join(hashlib.sha256(share.sealed).digest() for share in shares)
        body = _shares_body(self._book, reply.commitment, manifest)
        _verify(self._terms, place, Label.SIGN_SHARES, body, reply.signature)
        by_recipient = {share.owner: share.sealed for share in shares}
        self._sealed[place] = Sealed(reply.commitment, by_recipient, manifest, reply.signature)

    def _fold(self, place: int, reply: MaskedPart) -> None:
        digest = hashlib.sha256(np.ascontiguousarray(reply.payload).data).digest()
        _verify(self._terms, place, Label.SIGN_PART, _part_body(reply.part, digest), reply.signature)
        before = self._part_digests.setdefault(place, {}).get(reply.part, digest)
        _require(before == digest, f"sum: part {reply.part} is another than the one that was sent before")
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
        _verify(self._terms, place, Label.SIGN_REVEAL, digest, reply.signature)
        records = RevealedShare.unpack_all(reply.shares)
        survivors = {each.owner for each in Survivor.unpack_all(self._survivors)}
        circle = {*self._book.neighbours[place], place} & set(self._sealed)
        _require({record.owner for record in records} == circle, "reveal: not one share for each neighbour")
        for record in records:
            _require(record.kind == (SELF if record.owner in survivors else MASK), "reveal: a share of the wrong kind")
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
            owner, MASK, lambda seed: key_agreement.public_key(seed, Label.MASK_KEY, session) == advertised
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
