"""One owner in a masked sum."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from common import saved_state
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
    OpenShares,
    PartRequest,
    SharesDisputed,
    SharesOpened,
    SharesRevealed,
    SharesSealed,
    SurvivorList,
    SurvivorsSigned,
)
from common.saved_state import LongBytes, SavedState
from common.summation import key_agreement, mask_stream, secret_sharing
from common.summation.masked.book import (
    DIGEST_BYTES,
    MASK,
    SELF,
    Book,
    Shares,
    index_bytes,
    part_body,
    require,
    shares_body,
    survivors_body,
    upload_digest,
    verify_owner,
)
from common.summation.masked.phases import Phase
from common.summation.protocol import Inputs, SessionOver, SumTerms, Transition, Transitions, find_transition
from common.summation.records import (
    KeyEntry,
    OpenedShare,
    RevealedShare,
    SealedShare,
    ShareDelivery,
    Signed,
    Survivor,
)
from common.summation.secret_sharing import RandomBytes


@dataclass(frozen=True, kw_only=True)
class SavedMaskedOwner(SavedState):
    """What an owner saves between two messages. It drops each secret at the step after which it is not needed."""

    version: Literal[3] = 3
    phase: Phase = Phase.ADVERTISE_KEYS
    channel_seed: bytes = field(default=b"", repr=False)  # until MaskedInput
    mask_seed: bytes = field(default=b"", repr=False)  # until MaskedInput
    self_seed: bytes = field(default=b"", repr=False)  # until MaskedInput  # check: secrets-do-not-show
    book_data: LongBytes = b""
    own_shares: bytes = field(default=b"", repr=False)  # until MaskedInput, then among `held`
    dealt: Mapping[int, bytes] = field(default_factory=dict, repr=False)  # recipient -> two shares, until the survivors
    disputes: bytes = b""  # those that this owner opened shares for
    masks: tuple[mask_stream.Mask, ...] = field(default=(), repr=False)  # from MaskedInput until ConsistencyCheck
    held: Mapping[int, bytes] = field(default_factory=dict, repr=False)  # owner index -> two shares, until Unmasking
    commitments: Mapping[int, bytes] = field(default_factory=dict)  # owner index -> commitment to its self-mask seed
    part_digests: tuple[bytes, ...] = ()
    survivors: LongBytes = b""
    revealed: bytes = b""


@dataclass(frozen=True, kw_only=True)
class MaskedOwner(SavedMaskedOwner):
    """One owner in one masked sum. OWNER_TRANSITIONS says what it answers in which phase."""

    terms: SumTerms
    identity: Identity = field(repr=False)

    @classmethod
    def open(cls, terms: SumTerms, identity: Identity, random_bytes: RandomBytes) -> tuple[Self, Message]:
        """AdvertiseKeys."""
        channel_seed, mask_seed, self_seed = (random_bytes(key_agreement.SEED_BYTES) for _ in range(3))
        side = cls(terms=terms, identity=identity, channel_seed=channel_seed, mask_seed=mask_seed, self_seed=self_seed)
        entry = side._own_entry()
        reply = KeysAdvertised(
            session=terms.request.session,
            owner=identity.name,
            channel_key=entry.channel_key,
            mask_key=entry.mask_key,
            signature=entry.signature,
        )
        return side, reply

    def answer(self, request: Message, encoded: NDArray, random_bytes: RandomBytes) -> tuple[Self, Message]:
        transition = find_transition(OWNER_TRANSITIONS, self.phase, request, self.terms)
        try:
            return transition.follow(self, request, Inputs(encoded, random_bytes))
        except RemoteProtocolError as violation:
            raise SessionOver(
                violation.message, hint="this session is over and its secrets are wiped; a new run can start"
            ) from violation

    def _share_keys(self, request: KeyBook, inputs: Inputs) -> tuple[Self, Message]:
        book = Book(self.terms, request.entries)
        book.check()
        is_mine = book.entries.get(self._me) == self._own_entry()  # check: own-entry-is-mine
        require(is_mine, f"{Phase.SHARE_KEYS}: my own entry is missing or altered")
        self._check_enough(len(book.entries), Phase.SHARE_KEYS)  # check: enough-owners-in-the-key-book
        threshold = self.terms.neighbourhood.threshold
        neighbourhood = (*book.neighbours[self._me], self._me)  # I keep a share of my own secrets too
        points = [owner + 1 for owner in neighbourhood]
        self_shares = secret_sharing.split(self.self_seed, threshold, points, inputs.random_bytes)
        mask_shares = secret_sharing.split(self.mask_seed, threshold, points, inputs.random_bytes)
        sealed, private = [], book.channel_private_key(self.channel_seed)
        for other in book.neighbours[self._me]:
            key = book.seal_key(private, self._me, other, self._me)
            self_share, mask_share = self_shares[other + 1], mask_shares[other + 1]
            plain = index_bytes(other) + self_share + mask_share
            sealed.append(
                SealedShare(
                    other,
                    key_agreement.seal(key, plain, book.associated_data(self._me, other)),
                    book.share_commitment(self._me, other, SELF, self_share),
                    book.share_commitment(self._me, other, MASK, mask_share),
                )
            )
        commitment = book.commitment(self._me, self.self_seed)
        manifest = b"".join(share.digest for share in sealed)
        reply = SharesSealed(
            session=request.session,
            owner=self.identity.name,
            commitment=commitment,
            shares=SealedShare.pack_all(sealed),
            signature=self._sign(Domain.SIGN_SHARES, shares_body(book, commitment, manifest)),
        )
        own = self_shares[self._me + 1] + mask_shares[self._me + 1]
        dealt = {other: self_shares[other + 1] + mask_shares[other + 1] for other in book.neighbours[self._me]}
        return replace(self, book_data=request.entries, own_shares=own, dealt=dealt), reply

    def _begin_input(self, request: KeyShares, inputs: Inputs) -> tuple[Self, Message]:
        book = self.book
        deliveries = ShareDelivery.unpack_all(request.deliveries)
        senders = [delivery.owner for delivery in deliveries]
        require(
            set(senders) <= set(book.neighbours[self._me]), f"{Phase.MASKED_INPUT}: a sender is not my neighbour"
        )  # check: senders-are-neighbours
        self._check_neighbourhood(len(senders) + 1)  # check: enough-senders-of-shares
        held, disputed = {self._me: self.own_shares}, []
        opened = {each.owner: (each.self_share, each.mask_share) for each in OpenedShare.unpack_all(request.opened)}
        rest, private = request.manifests, book.channel_private_key(self.channel_seed)
        for delivery in deliveries:
            length = DIGEST_BYTES * len(book.neighbours[delivery.owner])
            manifest, rest = rest[:length], rest[length:]
            self._check_is_as_sent(book, delivery, manifest)
            found = (self._sealed_shares(book, private, delivery), opened.get(delivery.owner))
            good = [shares for shares in found if shares is not None and self._are_committed(book, delivery, shares)]
            if good:
                held[delivery.owner] = b"".join(good[0])
            else:
                disputed.append(delivery.owner)
        require(
            rest == b"", f"{Phase.MASKED_INPUT}: there are more manifests than senders"
        )  # check: manifests-fit-senders
        if disputed:
            return self._dispute(book, disputed)
        masks = [
            *book.pair_masks(self.mask_seed, self._me, senders),
            (book.self_mask(self.self_seed), 1),  # check: self-mask-is-added
        ]
        commitments = {each.owner: each.commitment for each in deliveries}
        commitments[self._me] = book.commitment(self._me, self.self_seed)
        state = replace(
            self,
            held=held,
            masks=tuple(masks),
            commitments=commitments,
            channel_seed=b"",
            mask_seed=b"",
            self_seed=b"",
            own_shares=b"",
        )
        return state._give(0, inputs.encoded)

    def _check_is_as_sent(self, book: Book, delivery: ShareDelivery, manifest: bytes) -> None:
        """Raise RemoteProtocolError unless the sender signed exactly this. Otherwise the coordinator is the liar."""
        sender = delivery.owner
        start = DIGEST_BYTES * book.neighbours[sender].index(self._me)
        sent = manifest[start : start + DIGEST_BYTES]
        is_intact = delivery.digest == sent  # check: share-is-the-one-sent
        require(is_intact, f"{Phase.MASKED_INPUT}: a share is not the one that was sent")
        body = shares_body(book, delivery.commitment, manifest)
        verify_owner(self.terms, sender, Domain.SIGN_SHARES, body, delivery.signature)  # check: shares-are-signed

    def _sealed_shares(self, book: Book, private: X25519PrivateKey, delivery: ShareDelivery) -> Shares | None:
        """The two shares in `delivery`; None if its sender sealed something else."""
        sender = delivery.owner
        key = book.seal_key(private, sender, self._me, self._me)
        try:
            plain = key_agreement.open_sealed(key, delivery.sealed, book.associated_data(sender, self._me))
            shares = _two_shares(plain[2:])
            for share in shares:
                secret_sharing.read_share(share)  # check: share-is-in-the-field
        except RemoteProtocolError:
            return None
        return shares if plain[:2] == index_bytes(self._me) else None  # check: share-is-at-my-point

    def _are_committed(self, book: Book, delivery: ShareDelivery, shares: Shares) -> bool:
        """Otherwise the sender could make me look like the liar, who reveals another share than I was sent."""
        commitments = (delivery.self_commitment, delivery.mask_commitment)
        return book.are_committed(delivery.owner, self._me, shares, commitments)  # check: share-fits-its-commitment

    def _dispute(self, book: Book, dealers: list[int]) -> tuple[Self, Message]:
        """Ask these neighbours, which signed what is wrong, to open my shares of their secrets. Nothing else leaves."""
        names = ", ".join(map(self.terms.name_of, dealers))
        require(
            self.phase == Phase.SHARE_KEYS,  # check: shares-are-disputed-once
            f"{Phase.DISPUTED_SHARES}: the shares of {names} are not opened, or are not those that it committed to",
        )
        disputes = [
            Signed(each, self._sign(Domain.SIGN_DISPUTE, book.dispute_body(each, self._me))) for each in dealers
        ]
        session = self.terms.request.session
        return self, SharesDisputed(session=session, owner=self.identity.name, disputes=Signed.pack_all(disputes))

    def _open_shares(self, request: OpenShares, inputs: Inputs) -> tuple[Self, Message]:
        """Give the coordinator the shares that I dealt to neighbours who say that they cannot use them.

        An honest one can. So if this owner is honest, whoever disputes its shares is dishonest, and the coordinator
        learns what that one could have told it.
        """
        book, disputes = self.book, Signed.unpack_all(request.disputes)
        require(
            len(disputes) <= self.terms.most_liars,  # check: few-shares-are-opened
            f"{Phase.DISPUTED_SHARES}: {len(disputes)} owners dispute my shares, at most {self.terms.most_liars} may",
        )
        for each in disputes:
            require(each.owner in self.dealt, f"{Phase.DISPUTED_SHARES}: I dealt no shares to an owner that disputes")
            body = book.dispute_body(self._me, each.owner)
            verify_owner(
                self.terms, each.owner, Domain.SIGN_DISPUTE, body, each.signature
            )  # check: disputes-are-signed
        is_first = self.disputes in (b"", request.disputes)  # check: shares-are-opened-once
        require(is_first, f"{Phase.DISPUTED_SHARES}: other shares were opened before")
        shares = OpenedShare.pack_all(
            OpenedShare(each.owner, *_two_shares(self.dealt[each.owner])) for each in disputes
        )
        reply = SharesOpened(
            session=request.session,
            owner=self.identity.name,
            shares=shares,
            signature=self._sign(Domain.SIGN_OPENED, hashlib.sha256(shares).digest()),
        )
        return replace(self, disputes=request.disputes), reply

    def _give_part(self, request: PartRequest, inputs: Inputs) -> tuple[Self, Message]:
        return self._give(request.part, inputs.encoded)

    def _give(self, part: int, encoded: NDArray) -> tuple[Self, Message]:
        slices = self.terms.part_slices
        is_next_or_earlier = part <= len(self.part_digests) and part < len(slices)
        require(is_next_or_earlier, f"{Phase.MASKED_INPUT}: part {part} is not the next one")
        position = slices[part]
        payload = np.array(encoded[position], dtype=self.terms.layout.dtype)
        mask_stream.add_masks(payload, self.masks, position.start)  # check: uploads-are-masked
        digest = hashlib.sha256(payload.data).digest()
        # After an owner dropped out, the coordinator asks for each part again: it gets the same bytes, or nothing.
        sent_before = part < len(self.part_digests)
        if sent_before and self.part_digests[part] != digest:  # check: sent-parts-never-change
            raise LocalProtocolError(f"sum: the vector has changed since part {part} was sent, so no more of it leaves")
        reply = MaskedPart(
            session=self.terms.request.session,
            owner=self.identity.name,
            part=part,
            payload=payload,
            signature=self._sign(Domain.SIGN_PART, part_body(part, digest)),
        )
        digests = self.part_digests if sent_before else (*self.part_digests, digest)
        return replace(self, part_digests=digests), reply

    def _sign_survivors(self, request: SurvivorList, inputs: Inputs) -> tuple[Self, Message]:
        survivors = {each.owner: each.upload for each in Survivor.unpack_all(request.survivors)}
        strangers = set(survivors) - set(self.book.entries)
        silent = (set(survivors) & set(self.book.neighbours[self._me])) - set(self.held)
        require(
            not strangers and not silent, f"{Phase.CONSISTENCY_CHECK}: a listed owner shared no keys"
        )  # check: survivors-shared-keys
        is_mine = survivors.get(self._me) == upload_digest(self.terms, self.part_digests)  # check: my-upload-is-listed
        require(is_mine, f"{Phase.CONSISTENCY_CHECK}: my upload is missing or altered")  # check: no-secret-in-errors
        self._check_enough(len(survivors), Phase.CONSISTENCY_CHECK)  # check: enough-survivors
        reply = SurvivorsSigned(
            session=request.session,
            owner=self.identity.name,
            signature=self._sign(Domain.SIGN_SURVIVORS, survivors_body(self.book, request.survivors)),
        )
        return replace(self, survivors=request.survivors, masks=(), dealt={}), reply

    def _reveal(self, request: Acknowledgements, inputs: Inputs) -> tuple[Self, Message]:
        survivors = {each.owner for each in Survivor.unpack_all(self.survivors)}
        signed = Signed.unpack_all(request.signatures)
        body = survivors_body(self.book, self.survivors)
        for each in signed:
            require(each.owner in survivors, f"{Phase.UNMASKING}: a signer is not a survivor")  # check: signer-survived
            verify_owner(self.terms, each.owner, Domain.SIGN_SURVIVORS, body, each.signature)  # check: signed-this-list
        require(
            len(signed) >= self.terms.quorum,  # check: quorum-signed-the-survivor-list
            f"{Phase.UNMASKING}: {len(signed)} owners signed the survivor list, the quorum is {self.terms.quorum}",
        )
        revealed = self.revealed or self._shares_for(survivors)  # check: shares-are-chosen-once
        reply = SharesRevealed(
            session=request.session,
            owner=self.identity.name,
            shares=revealed,
            signature=self._sign(Domain.SIGN_REVEAL, hashlib.sha256(revealed).digest()),
        )
        return replace(self, held={}, revealed=revealed), reply  # check: shares-are-dropped-once-revealed

    def _shares_for(self, survivors: set[int]) -> bytes:
        """One share for each owner: of its self-mask seed or its mask-key seed, never of both."""
        shares = []
        for owner, both in self.held.items():
            self_share, mask_share = _two_shares(both)
            shares.append(
                RevealedShare(owner, SELF, self_share) if owner in survivors else RevealedShare(owner, MASK, mask_share)
            )
        return RevealedShare.pack_all(shares)  # check: one-secret-of-each-owner

    def _check_enough(self, count: int, step: Phase) -> None:
        needed = max(self.terms.quorum, self.terms.needed_owners)  # check: quorum-counts-too
        require(count >= needed, f"{step}: {count} owners, the agreement needs {needed}")

    def _check_neighbourhood(self, count: int) -> None:
        """In the complete graph, everybody is a neighbour. In a sparse one, ConsistencyCheck counts all owners."""
        if self.terms.neighbourhood.degree == len(self.terms.roster) - 1:
            self._check_enough(count, Phase.MASKED_INPUT)
        threshold = self.terms.neighbourhood.threshold
        require(
            count >= threshold,
            f"{Phase.MASKED_INPUT}: {count} owners of my neighbourhood sent shares, {threshold} are needed",
        )

    def _own_entry(self) -> KeyEntry:
        session = self.terms.session
        channel_key = key_agreement.public_key(self.channel_seed, Domain.CHANNEL_KEY, session)
        mask_key = key_agreement.public_key(self.mask_seed, Domain.MASK_KEY, session)  # check: keys-are-of-one-session
        return KeyEntry(self._me, channel_key, mask_key, self._sign(Domain.SIGN_KEYS, channel_key + mask_key))

    def _sign(self, domain: Domain, body: bytes) -> bytes:
        return self.identity.sign(domain, self.terms.session, body)

    @property
    def _me(self) -> int:
        return self.terms.indices[self.identity.name]

    @property
    def book(self) -> Book:
        """The key book, once the owner has checked it."""
        return Book(self.terms, self.book_data)

    @property
    def offers(self) -> bool:
        return bool(self.part_digests)

    @property
    def reveals(self) -> bool:
        return self.phase == Phase.UNMASKING

    @property
    def is_complete(self) -> bool:
        return self.phase == Phase.UNMASKING

    @property
    def is_done(self) -> bool:
        return self.phase in (Phase.CONSISTENCY_CHECK, Phase.UNMASKING)

    def to_json(self) -> dict[str, Any]:
        return saved_state.to_json(SavedMaskedOwner, self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any], terms: SumTerms, identity: Identity) -> Self:
        return cls(terms=terms, identity=identity, **vars(saved_state.from_json(SavedMaskedOwner, state)))


# An owner enters ADVERTISE_KEYS by answering OpenSum. A coordinator that restarts may repeat the Unmasking request.
OWNER_TRANSITIONS: Transitions = {  # check: no-other-transition
    (Phase.ADVERTISE_KEYS, KeyBook): Transition(MaskedOwner._share_keys, Phase.SHARE_KEYS),
    (Phase.SHARE_KEYS, KeyShares): Transition(
        MaskedOwner._begin_input,
        Phase.MASKED_INPUT,
        after_last_part=Phase.WHOLE_INPUT,
        after_dispute=Phase.DISPUTED_SHARES,
    ),
    (Phase.DISPUTED_SHARES, KeyShares): Transition(
        MaskedOwner._begin_input, Phase.MASKED_INPUT, after_last_part=Phase.WHOLE_INPUT
    ),
    (Phase.SHARE_KEYS, OpenShares): Transition(MaskedOwner._open_shares, Phase.SHARE_KEYS),
    (Phase.DISPUTED_SHARES, OpenShares): Transition(MaskedOwner._open_shares, Phase.DISPUTED_SHARES),
    (Phase.MASKED_INPUT, OpenShares): Transition(MaskedOwner._open_shares, Phase.MASKED_INPUT),
    (Phase.WHOLE_INPUT, OpenShares): Transition(MaskedOwner._open_shares, Phase.WHOLE_INPUT),
    (Phase.MASKED_INPUT, PartRequest): Transition(
        MaskedOwner._give_part, Phase.MASKED_INPUT, after_last_part=Phase.WHOLE_INPUT
    ),
    (Phase.WHOLE_INPUT, PartRequest): Transition(MaskedOwner._give_part, Phase.WHOLE_INPUT),
    (Phase.WHOLE_INPUT, SurvivorList): Transition(MaskedOwner._sign_survivors, Phase.CONSISTENCY_CHECK),
    (Phase.CONSISTENCY_CHECK, Acknowledgements): Transition(MaskedOwner._reveal, Phase.UNMASKING),
    (Phase.UNMASKING, Acknowledgements): Transition(MaskedOwner._reveal, Phase.UNMASKING),
}


def _two_shares(both: bytes) -> tuple[bytes, bytes]:
    """The share of the self-mask seed, and that of the mask-key seed."""
    return both[: secret_sharing.SHARE_BYTES], both[secret_sharing.SHARE_BYTES :]
