"""The coordinator in a masked sum."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from common.domain_separation import Domain
from common.errors import RemoteProtocolError, TooFewOwners
from common.mapped import release
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
    UploadsOpened,
)
from common.summation import key_agreement, mask_stream, secret_sharing
from common.summation.accumulator import Zeros, zeros_in_memory
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
from common.summation.masked.evidence import Evidence, Lie, ProvenLie
from common.summation.masked.phases import Phase
from common.summation.protocol import (
    DONE,
    CoordinatorSide,
    CoordinatorStep,
    Opening,
    SavedOpening,
    SumAbandoned,
    SumTerms,
)
from common.summation.records import (
    KeyEntry,
    OpenedSeed,
    OpenedShare,
    RevealedShare,
    SealedShare,
    ShareDelivery,
    Signed,
    Survivor,
)


@dataclass(frozen=True)
class Sealed:
    """What one owner sent to its neighbours: `shares` by recipient."""

    commitment: bytes
    shares: Mapping[int, SealedShare]
    manifest: bytes
    signature: bytes


class MaskedCoordinator(CoordinatorSide):
    """The coordinator in one masked sum. COORDINATOR_STEPS says what it sends and expects in which phase.

    It checks what each owner sends, so that none can spoil the others' sum.
    """

    def __init__(self, terms: SumTerms, participants: tuple[str, ...], zeros: Zeros = zeros_in_memory) -> None:
        super().__init__(terms, participants, zeros)
        self._entries: dict[int, KeyEntry] = {}
        self._book = Book(terms, b"")
        self._sealed: dict[int, Sealed] = {}
        self._disputes: dict[int, dict[int, bytes]] = {}  # dealer -> recipient that disputes its shares -> signature
        self._opened: dict[int, dict[int, OpenedShare]] = {}  # recipient -> dealer -> the shares that it opened
        self._part_digests: dict[int, dict[int, bytes]] = {}
        self._survivors = b""
        self._dealt: dict[int, Mapping[int, bytes]] = {}  # dealer -> recipient -> commitment to the share to reveal
        self._signed: dict[int, bytes] = {}
        self._revealed: dict[tuple[int, bytes], dict[int, bytes]] = {}  # (owner, kind) -> point -> share
        self._uploads: dict[int, bytes] = {}  # owner index -> masked vector, if all owners open the sum
        self._seeds: list[OpenedSeed] = []

    @property
    def _steps(self) -> Mapping[str, CoordinatorStep]:
        return COORDINATOR_STEPS

    # --- AdvertiseKeys ---

    def _open(self, index: int) -> Message:
        return self._terms.request

    def _take_keys(self, index: int, reply: KeysAdvertised) -> None:
        entry = KeyEntry(index, reply.channel_key, reply.mask_key, reply.signature)
        check_entry(self._terms, entry)
        self._entries[index] = entry

    def _make_book(self) -> None:
        self._book = Book(self._terms, KeyEntry.pack_all(self._entries.values()))

    # --- ShareKeys ---

    def _send_book(self, index: int) -> Message:
        return KeyBook(session=self._terms.request.session, entries=self._book.data)

    def _take_shares(self, index: int, reply: SharesSealed) -> None:
        shares = SealedShare.unpack_all(reply.shares)
        recipients = tuple(share.owner for share in shares)
        require(recipients == self._book.neighbours[index], f"{Phase.SHARE_KEYS}: not one share for each neighbour")
        manifest = b"".join(share.digest for share in shares)
        body = shares_body(self._book, reply.commitment, manifest)
        verify_owner(self._terms, index, Domain.SIGN_SHARES, body, reply.signature)
        by_recipient = {share.owner: share for share in shares}
        self._sealed[index] = Sealed(reply.commitment, by_recipient, manifest, reply.signature)

    # --- MaskedInput ---

    def _ask_input(self, index: int) -> Message:
        if index not in self._part_digests:
            return self._key_shares(index)
        return PartRequest(session=self._terms.request.session, part=self._accumulator.part)

    def _key_shares(self, recipient: int) -> KeyShares:
        deliveries, manifests = [], []
        for sender in self._book.neighbours[recipient]:
            if sender in self._sealed:
                sealed = self._sealed[sender]
                share = sealed.shares[recipient]
                delivery = ShareDelivery(
                    sender,
                    sealed.commitment,
                    share.sealed,
                    share.self_commitment,
                    share.mask_commitment,
                    sealed.signature,
                )
                deliveries.append(delivery)
                manifests.append(sealed.manifest)
        return KeyShares(
            session=self._terms.request.session,
            deliveries=ShareDelivery.pack_all(deliveries),
            manifests=b"".join(manifests),
            opened=OpenedShare.pack_all(self._opened.get(recipient, {}).values()),
        )

    def _take_input(self, index: int, reply: MaskedPart | SharesDisputed) -> None:
        if isinstance(reply, SharesDisputed):
            self._take_disputes(index, reply)
        else:
            self._fold(index, reply)

    def _fold(self, index: int, reply: MaskedPart) -> None:
        digest = hashlib.sha256(np.ascontiguousarray(reply.payload).data).digest()
        verify_owner(
            self._terms, index, Domain.SIGN_PART, part_body(reply.part, digest), reply.signature
        )  # check: part-is-signed
        before = self._part_digests.setdefault(index, {}).get(reply.part, digest)
        require(
            before == digest, f"{Phase.MASKED_INPUT}: part {reply.part} differs from the one that was sent before"
        )  # check: same-part-again
        self._accumulator.fold(reply.owner, reply.part, reply.payload)
        self._part_digests[index][reply.part] = digest
        if self._terms.is_open:
            self._uploads[index] = np.ascontiguousarray(reply.payload).tobytes()

    def _end_part(self) -> str | None:
        if self._disputes and not self._opened:
            return self._begin_disputes()
        if self._accumulator.advance():
            return Phase.MASKED_INPUT
        self._survivors = Survivor.pack_all(self._survivor_records())
        survivors = self._survivor_indices()
        for dealer, sealed in self._sealed.items():
            self._dealt[dealer] = {
                recipient: share.self_commitment if dealer in survivors else share.mask_commitment
                for recipient, share in sealed.shares.items()
            }
        return None

    def _survivor_records(self) -> list[Survivor]:
        records = []
        for name in self._remaining:
            index = self._terms.indices[name]
            digests = [self._part_digests[index][part] for part in sorted(self._part_digests[index])]
            records.append(Survivor(index, upload_digest(self._terms, digests)))
        return records

    # --- disputed shares ---

    def _take_disputes(self, index: int, reply: SharesDisputed) -> None:
        """An owner cannot use the shares that these neighbours dealt it, and says so before it gives anything."""
        has_disputed = any(index in by_recipient for by_recipient in self._disputes.values())
        require(
            not self._opened and not has_disputed and index not in self._part_digests,
            f"{Phase.MASKED_INPUT}: it disputes shares after it was to give its vector",
        )
        signed = Signed.unpack_all(reply.disputes)
        is_about_neighbours = {each.owner for each in signed} <= {*self._book.neighbours[index]} & set(self._sealed)
        require(bool(signed) and is_about_neighbours, f"{Phase.MASKED_INPUT}: it disputes shares that nobody dealt it")
        for each in signed:
            body = self._book.dispute_body(each.owner, index)
            verify_owner(self._terms, index, Domain.SIGN_DISPUTE, body, each.signature)
        for each in signed:
            self._disputes.setdefault(each.owner, {})[index] = each.signature

    def _begin_disputes(self) -> str:
        """Have the dealers open what is disputed. The parts that the other owners gave are asked for again later."""
        for dealer, by_recipient in self._disputes.items():
            if len(by_recipient) > self._terms.most_liars:  # check: many-disputes-name-the-dealer
                name = self._terms.names[dealer]
                self.violations[name] = ProvenLie(
                    f"owner {name} lied: {len(by_recipient)} owners dispute the shares that it dealt them, and at most "
                    f"{self._terms.most_liars} of them can be lying",
                    self._evidence("disputed", dealer, dealer, {}, by_recipient),
                )
        self._check_dealers({self._terms.indices[name] for name in self._remaining - set(self.violations)})
        self._accumulator.start_again()
        return Phase.DISPUTED_SHARES

    def _ask_to_open(self, index: int) -> Message | None:
        if index not in self._disputes:
            return None
        disputes = Signed.pack_all(Signed(owner, signature) for owner, signature in self._disputes[index].items())
        return OpenShares(session=self._terms.request.session, disputes=disputes)

    def _take_opened(self, index: int, reply: SharesOpened) -> None:
        digest = hashlib.sha256(reply.shares).digest()
        verify_owner(self._terms, index, Domain.SIGN_OPENED, digest, reply.signature)
        shares = OpenedShare.unpack_all(reply.shares)
        name, sealed = self._terms.names[index], self._sealed[index].shares
        is_one_each = {each.owner for each in shares} == set(self._disputes[index])
        require(is_one_each, f"owner {name} lied: it did not open the shares that are disputed")
        for each in shares:
            dealt, opened = sealed[each.owner], (each.self_share, each.mask_share)
            commitments = (dealt.self_commitment, dealt.mask_commitment)
            if not self._book.are_committed(
                index, each.owner, opened, commitments
            ):  # check: opened-shares-are-the-dealt-ones
                raise ProvenLie(
                    f"owner {name} lied: it opened other shares for {self._terms.names[each.owner]} than it committed "
                    "to",
                    self._evidence("opened", index, index, {index: reply.shares}, {index: reply.signature}),
                )
        for each in shares:
            self._opened.setdefault(each.owner, {})[index] = OpenedShare(index, each.self_share, each.mask_share)

    def _end_disputes(self) -> None:
        self._check_dealers({dealer for by_dealer in self._opened.values() for dealer in by_dealer})

    def _check_dealers(self, good: set[int]) -> None:
        """Raise SumAbandoned unless all dealers whose shares are disputed are `good`.

        The sum could not do without one: the shares that open the masks which it leaves behind may be too few.
        """
        bad = ", ".join(self._terms.names[dealer] for dealer in sorted(set(self._disputes) - good))
        if bad:
            raise SumAbandoned(f"{Phase.DISPUTED_SHARES}: {bad} did not open shares that others could not use")

    # --- ConsistencyCheck ---

    def _send_survivors(self, index: int) -> Message:
        return SurvivorList(session=self._terms.request.session, survivors=self._survivors)

    def _take_signature(self, index: int, reply: SurvivorsSigned) -> None:
        body = survivors_body(self._book, self._survivors)
        verify_owner(self._terms, index, Domain.SIGN_SURVIVORS, body, reply.signature)
        self._signed[index] = reply.signature

    def _end_signatures(self) -> None:
        """Raise SumAbandoned if an owner did not sign that must. Nobody has helped to open the sum yet."""
        silent = ", ".join(self._terms.names[index] for index in sorted(self._survivor_indices() - set(self._signed)))
        if self._terms.all_must_sign and silent:  # check: who-verifies-knows-with-whom
            raise SumAbandoned(f"{Phase.CONSISTENCY_CHECK}: {silent} did not sign who is in the sum")

    # --- Unmasking ---

    def _acknowledge(self, index: int) -> Message:
        signed = Signed.pack_all(Signed(owner, signature) for owner, signature in self._signed.items())
        return Acknowledgements(session=self._terms.request.session, signatures=signed)

    def _take_revealed(self, index: int, reply: SharesRevealed) -> None:
        digest = hashlib.sha256(reply.shares).digest()
        verify_owner(self._terms, index, Domain.SIGN_REVEAL, digest, reply.signature)
        records = RevealedShare.unpack_all(reply.shares)
        survivors = self._survivor_indices()
        neighbourhood = {*self._book.neighbours[index], index} & set(self._sealed)
        is_one_each = {record.owner for record in records} == neighbourhood
        require(is_one_each, f"{Phase.UNMASKING}: not one share for each neighbour")
        for record in records:
            is_right_kind = record.kind == (SELF if record.owner in survivors else MASK)  # check: share-is-of-its-kind
            require(is_right_kind, f"{Phase.UNMASKING}: a share of the wrong kind")
            secret_sharing.read_share(record.share)
            self._check_is_the_dealt_share(index, record, reply)
        for record in records:
            self._revealed.setdefault((record.owner, record.kind), {})[index + 1] = record.share

    def _check_is_the_dealt_share(self, index: int, record: RevealedShare, reply: SharesRevealed) -> None:
        """Raise ProvenLie for a share other than the one that its dealer committed to.

        The revealer had checked the commitment, so it lies now. The dealer's signature and its own prove it to anybody.
        """
        if record.owner == index:  # nobody else holds it: if it is wrong, the dealer is the liar
            return
        revealed = self._book.share_commitment(record.owner, index, record.kind, record.share)
        if revealed != self._dealt[record.owner][index]:  # check: revealed-share-is-the-dealt-one
            raise ProvenLie(
                f"{Phase.UNMASKING}: its share of {self._terms.names[record.owner]}'s secret is not the one that it "
                "was dealt: it lied",
                self._evidence("revealed", index, record.owner, {index: reply.shares}, {index: reply.signature}),
            )

    def _unmask(self) -> None:
        """Remove the survivors' self masks, and the pair masks that owners who dropped out left behind."""
        survivors = self._survivor_indices()
        self._seeds = [
            OpenedSeed(owner, SELF, self._rebuild_self_seed(owner))
            if owner in survivors
            else OpenedSeed(owner, MASK, self._rebuild_mask_seed(owner))
            for owner in self._sealed
        ]
        masks, vector = self._book.remaining_masks(self._seeds, survivors), self._accumulator.vector
        for position in self._accumulator.slices:
            mask_stream.add_masks(vector[position], masks, position.start)
            release(vector)

    def uploads_opened(self) -> UploadsOpened | None:
        if not self._terms.is_open:
            return None
        uploads = b"".join(self._uploads[index] for index in sorted(self._survivor_indices()))
        return UploadsOpened(
            session=self._terms.request.session,
            proofs=OpenedSeed.pack_all(self._seeds),
            payload=np.frombuffer(uploads, self._terms.layout.dtype),
        )

    def _rebuild_self_seed(self, owner: int) -> bytes:
        commitment = self._sealed[owner].commitment
        return self._rebuild(owner, SELF, lambda seed: self._book.commitment(owner, seed) == commitment)

    def _rebuild_mask_seed(self, owner: int) -> bytes:
        advertised, session = self._book.entries[owner].mask_key, self._terms.session
        return self._rebuild(
            owner, MASK, lambda seed: key_agreement.public_key(seed, Domain.MASK_KEY, session) == advertised
        )

    def _rebuild(self, owner: int, kind: bytes, fits: Callable[[bytes], bool]) -> bytes:
        """An owner's secret, from the revealed shares.

        Each of them is what the owner itself dealt, or revealed. So if they do not fit together, it has lied.
        """
        shares, threshold = self._revealed.get((owner, kind), {}), self._terms.neighbourhood.threshold
        name = self._terms.names[owner]
        if len(shares) < threshold:
            raise TooFewOwners(
                f"{Phase.UNMASKING}: {len(shares)} of {name}'s neighbours revealed a share, {threshold} are needed. "
                "No total was computed",
                hint="bring the missing owners back, then run the same command again to resume",
            )
        points = tuple(sorted(shares)[:threshold])
        with suppress(RemoteProtocolError):
            seed = secret_sharing.reconstruct(shares, _coefficients(points))
            if fits(seed):  # check: rebuilt-secret-fits
                return seed
        lie = f"{Phase.UNMASKING}: owner {name} lied: the shares of its secret do not fit what it committed to"
        with suppress(RemoteProtocolError):
            seed = secret_sharing.reconstruct_corrected(shares, threshold)
            if fits(seed):  # check: corrected-secret-fits
                self.violations[name] = ProvenLie(lie, self._dealt_evidence(owner, kind, shares))
                return seed
        raise ProvenLie(
            f"{lie}. No total was computed",
            self._dealt_evidence(owner, kind, shares),
            hint=f"the owners helped to open this sum, and will not open another: make a new agreement without {name}",
        )

    # --- who lied ---

    def _evidence(
        self, lie: Lie, owner: int, dealer: int, words: Mapping[int, bytes], spoken: Mapping[int, bytes]
    ) -> Evidence:
        sealed = self._sealed[dealer]
        return Evidence(
            lie=lie,
            owner=owner,
            dealer=dealer,
            book=self._book.data,
            commitment=sealed.commitment,
            sealed=SealedShare.pack_all(sealed.shares.values()),
            signature=sealed.signature,
            words=words,
            spoken=spoken,
        )

    def _dealt_evidence(self, dealer: int, kind: bytes, shares: Mapping[int, bytes]) -> Evidence:
        """What the owners revealed of one secret; the dealer's own share counts for nothing."""
        words = {
            point - 1: RevealedShare.pack_all([RevealedShare(dealer, kind, share)])
            for point, share in shares.items()
            if point - 1 != dealer
        }
        return self._evidence("dealt", dealer, dealer, words, {})

    # --- the end ---

    def _survivor_indices(self) -> set[int]:
        return {each.owner for each in Survivor.unpack_all(self._survivors)}

    def _summed_owners(self) -> tuple[str, ...]:
        return tuple(self._terms.names[index] for index in sorted(self._survivor_indices()))

    # --- across a restart ---

    def opening(self) -> Opening | None:
        if self._phase != Phase.UNMASKING:
            return None
        state = SavedOpening(
            remaining=tuple(sorted(self._remaining)),
            book=self._book.data,
            commitments={index: sealed.commitment for index, sealed in self._sealed.items()},
            dealt=self._dealt,
            sealed={index: SealedShare.pack_all(sealed.shares.values()) for index, sealed in self._sealed.items()},
            sealed_signatures={index: sealed.signature for index, sealed in self._sealed.items()},
            survivors=self._survivors,
            signatures=self._signed,
            uploads=self._uploads,
        )
        return Opening(state, self._accumulator.words)

    @classmethod
    def reopen(cls, terms: SumTerms, opening: Opening) -> Self:
        state = opening.state
        side = cls(terms, state.remaining, lambda _: opening.words)
        side._phase = Phase.UNMASKING
        side._book = Book(terms, state.book)
        for index, commitment in state.commitments.items():
            shares = {each.owner: each for each in SealedShare.unpack_all(state.sealed[index])}
            side._sealed[index] = Sealed(commitment, shares, b"", state.sealed_signatures[index])
        side._dealt = dict(state.dealt)
        side._survivors = state.survivors
        side._signed = dict(state.signatures)
        side._uploads = dict(state.uploads)
        return side


COORDINATOR_STEPS: Mapping[str, CoordinatorStep] = {
    Phase.ADVERTISE_KEYS: CoordinatorStep(
        request=MaskedCoordinator._open,
        expects=(KeysAdvertised,),
        handle=MaskedCoordinator._take_keys,
        end=MaskedCoordinator._make_book,
        next_phase=Phase.SHARE_KEYS,
    ),
    Phase.SHARE_KEYS: CoordinatorStep(
        request=MaskedCoordinator._send_book,
        expects=(SharesSealed,),
        handle=MaskedCoordinator._take_shares,
        next_phase=Phase.MASKED_INPUT,
    ),
    Phase.MASKED_INPUT: CoordinatorStep(
        request=MaskedCoordinator._ask_input,
        expects=(MaskedPart, SharesDisputed),
        handle=MaskedCoordinator._take_input,
        end=MaskedCoordinator._end_part,
        next_phase=Phase.CONSISTENCY_CHECK,
        in_parts=True,
    ),
    Phase.DISPUTED_SHARES: CoordinatorStep(  # a detour from MaskedInput, only if shares are disputed
        request=MaskedCoordinator._ask_to_open,
        expects=(SharesOpened,),
        handle=MaskedCoordinator._take_opened,
        end=MaskedCoordinator._end_disputes,
        next_phase=Phase.MASKED_INPUT,
    ),
    Phase.CONSISTENCY_CHECK: CoordinatorStep(
        request=MaskedCoordinator._send_survivors,
        expects=(SurvivorsSigned,),
        handle=MaskedCoordinator._take_signature,
        end=MaskedCoordinator._end_signatures,
        next_phase=Phase.UNMASKING,
    ),
    Phase.UNMASKING: CoordinatorStep(
        request=MaskedCoordinator._acknowledge,
        expects=(SharesRevealed,),
        handle=MaskedCoordinator._take_revealed,
        end=MaskedCoordinator._unmask,
        next_phase=DONE,
    ),
}


@lru_cache(maxsize=1000)
def _coefficients(points: tuple[int, ...]) -> dict[int, int]:
    """One set of coefficients serves all the secrets that the same owners reveal."""
    return secret_sharing.coefficients_at_zero(points)
