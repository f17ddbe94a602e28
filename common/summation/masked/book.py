"""What both sides of a masked sum compute alike: the key book, its keys and masks, and what is hashed and signed."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.identity import verify
from common.summation import key_agreement, mask_stream
from common.summation.masked.neighbours import NeighbourGraph
from common.summation.masked.phases import Phase
from common.summation.protocol import SumTerms
from common.summation.records import KeyEntry, OpenedSeed

SELF, MASK = b"s", b"m"  # which of an owner's two secrets a revealed share belongs to
DIGEST_BYTES = 32
Shares = tuple[bytes, bytes]  # of an owner's self-mask seed, and of its mask-key seed


@dataclass(frozen=True)
class Book:
    """The key book of one session: who takes part with which keys, and who are neighbours."""

    terms: SumTerms
    data: bytes  # KeyEntry.pack_all

    @cached_property
    def entries(self) -> Mapping[int, KeyEntry]:
        return _entries(self.data)

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(Domain.KEY_BOOK.value + self.terms.session + self.data).digest()

    @cached_property
    def neighbours(self) -> NeighbourGraph:
        return _graph(self.digest, tuple(self.entries), self.terms.neighbourhood.degree)

    def check(self) -> None:
        """Raise RemoteProtocolError unless all entries are signed under the pinned keys, and all keys are distinct."""
        keys = [key for entry in self.entries.values() for key in (entry.channel_key, entry.mask_key)]
        require(
            len(set(keys)) == len(keys), f"{Phase.SHARE_KEYS}: duplicate key in the key book"
        )  # check: keys-are-distinct
        for entry in self.entries.values():
            check_entry(self.terms, entry)  # check: key-entries-are-signed

    def channel_private_key(self, channel_seed: bytes) -> X25519PrivateKey:
        """What `seal_key` takes: made once for all neighbours, since making it takes as long as using it."""
        return key_agreement.private_key(channel_seed, Domain.CHANNEL_KEY, self.terms.session)

    def seal_key(self, private: X25519PrivateKey, sender: int, recipient: int, me: int) -> bytes:
        """The key that seals from `sender` to `recipient`. `me` is one of them, and `private` is its channel key."""
        other = self.entries[recipient if me == sender else sender].channel_key
        shared = key_agreement.agree(private, other)
        return key_agreement.derive(shared, Domain.SEAL_KEY, self.digest, _direction(sender, recipient))

    def pair_masks(self, mask_seed: bytes, me: int, others: Sequence[int]) -> list[mask_stream.Mask]:
        """The masks that `me` shares with each of `others`. The owner with the smaller index adds its mask."""
        private = key_agreement.private_key(mask_seed, Domain.MASK_KEY, self.terms.session)
        return [(self._pair_key(private, me, other), 1 if me < other else -1) for other in others]

    def remaining_masks(self, seeds: Sequence[OpenedSeed], survivors: Set[int]) -> list[mask_stream.Mask]:
        """What is to be added to the sum of the survivors' masked vectors, so that only their own numbers remain."""
        masks: list[mask_stream.Mask] = []
        for each in seeds:
            if each.owner in survivors:
                masks.append((self.self_mask(each.seed), -1))
            else:
                # The survivors added the same masks with the opposite sign: adding the missing owner's cancels them.
                others = [other for other in self.neighbours[each.owner] if other in survivors]
                masks += self.pair_masks(each.seed, each.owner, others)
        return masks

    def _pair_key(self, private: Any, me: int, other: int) -> bytes:
        shared = key_agreement.agree(private, self.entries[other].mask_key)
        pair = _direction(min(me, other), max(me, other))
        return key_agreement.derive(shared, Domain.PAIR_MASK, self.digest, pair, mask_stream.KEY_BYTES)

    def self_mask(self, self_seed: bytes) -> bytes:
        return key_agreement.derive(self_seed, Domain.SELF_MASK, self.digest, length=mask_stream.KEY_BYTES)

    def commitment(self, owner: int, self_seed: bytes) -> bytes:
        return hashlib.sha256(Domain.SEED_COMMITMENT.value + self.digest + index_bytes(owner) + self_seed).digest()

    def share_commitment(self, sender: int, recipient: int, kind: bytes, share: bytes) -> bytes:
        """What a sender publishes of one share. A share is uniform in the field, so this hides it."""
        about = self.digest + _direction(sender, recipient) + kind
        return hashlib.sha256(Domain.SHARE_COMMITMENT.value + about + share).digest()

    def are_committed(self, sender: int, recipient: int, shares: Shares, commitments: tuple[bytes, bytes]) -> bool:
        """Whether these two shares are those that the sender committed to when it dealt them to the recipient."""
        pairs = zip((SELF, MASK), shares, strict=True)
        return commitments == tuple(self.share_commitment(sender, recipient, kind, share) for kind, share in pairs)

    def dispute_body(self, sender: int, recipient: int) -> bytes:
        """What a recipient signs that cannot use the shares that this sender dealt it."""
        return self.digest + _direction(sender, recipient)  # check: disputes-name-their-direction

    def associated_data(self, sender: int, recipient: int) -> bytes:
        return self.digest + _direction(sender, recipient)  # check: seals-name-their-direction


# In a simulation, all owners are in one process and read the same book again and again.
@lru_cache(maxsize=4)
def _entries(data: bytes) -> Mapping[int, KeyEntry]:
    return MappingProxyType({entry.owner: entry for entry in KeyEntry.unpack_all(data)})


@lru_cache(maxsize=4)
def _graph(digest: bytes, owners: tuple[int, ...], degree: int) -> NeighbourGraph:
    return NeighbourGraph(digest, owners, degree)


def check_entry(terms: SumTerms, entry: KeyEntry) -> None:
    """Raise RemoteProtocolError unless its keys are good, and signed under the owner's pinned key for this session."""
    for key in (entry.channel_key, entry.mask_key):
        key_agreement.check_public_key(key)
    verify_owner(terms, entry.owner, Domain.SIGN_KEYS, entry.channel_key + entry.mask_key, entry.signature)


def upload_digest(terms: SumTerms, part_digests: Sequence[bytes]) -> bytes:
    return hashlib.sha256(Domain.UPLOAD.value + terms.session + b"".join(part_digests)).digest()


def survivors_body(book: Book, survivors: bytes) -> bytes:
    signed = book.digest + survivors  # check: survivors-are-of-one-book
    return hashlib.sha256(Domain.SURVIVORS.value + book.terms.session + signed).digest()


def shares_body(book: Book, commitment: bytes, manifest: bytes) -> bytes:
    return book.digest + commitment + manifest


def part_body(part: int, digest: bytes) -> bytes:
    return part.to_bytes(4) + digest


def verify_owner(terms: SumTerms, index: int, domain: Domain, body: bytes, signature: bytes) -> None:
    name = terms.name_of(index)
    verify(terms.roster[name], domain, terms.session, name, body, signature)


def index_bytes(owner: int) -> bytes:
    return owner.to_bytes(2)


def _direction(sender: int, recipient: int) -> bytes:
    return index_bytes(sender) + index_bytes(recipient)


def require(condition: bool, violation: str) -> None:
    if not condition:
        raise RemoteProtocolError(violation)
