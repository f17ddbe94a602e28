"""Lists of small fixed-size records in bytes: entries of a key book, of a survivor list and so on.

Lists are canonical: strictly ascending by their first field, the owner index. Two lists are therefore equal exactly
when their bytes are, and no owner is in one twice.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from typing import ClassVar, Self

from common.errors import RemoteProtocolError

MAX_OWNERS = 65_535  # an owner index is two bytes


@dataclass(frozen=True)
class Record:
    """Base of the records below; `FORMAT` is the `struct` format of their fields."""

    FORMAT: ClassVar[Struct]

    owner: int

    @classmethod
    def pack_all(cls, records: Iterable[Self]) -> bytes:
        return b"".join(
            cls.FORMAT.pack(*vars(record).values()) for record in sorted(records, key=lambda each: each.owner)
        )

    @classmethod
    def unpack_all(cls, data: bytes) -> list[Self]:
        """Read whole records in ascending order. Raises RemoteProtocolError on anything else."""
        if len(data) % cls.FORMAT.size:  # check: records-are-whole
            raise RemoteProtocolError(
                f"{cls.__name__}: {len(data)} bytes are not a whole number of {cls.FORMAT.size}-byte records"
            )
        records = [cls(*values) for values in cls.FORMAT.iter_unpack(data)]
        if any(later.owner <= earlier.owner for earlier, later in pairwise(records)):  # check: owners-ascend
            raise RemoteProtocolError(f"{cls.__name__}: the owners are not in strictly ascending order")
        return records


@dataclass(frozen=True)
class KeyEntry(Record):
    """An owner's entry in the key book: its two public keys, and its signature over them."""

    FORMAT = Struct(">H32s32s64s")

    channel_key: bytes
    mask_key: bytes
    signature: bytes


@dataclass(frozen=True)
class SealedShare(Record):
    """One recipient's shares of the sender's two seeds, sealed. `owner` is the recipient.

    The commitments are to the two shares: whoever reveals another share later can be named, and so can a sender whose
    shares do not fit together.
    """

    FORMAT = Struct(">H84s32s32s")

    sealed: bytes
    self_commitment: bytes
    mask_commitment: bytes

    @property
    def digest(self) -> bytes:
        """What the sender signs of it, 32 bytes."""
        return sealed_digest(self)


@dataclass(frozen=True)
class ShareDelivery(Record):
    """What one sender (`owner`) has for one recipient: commitment, sealed share, signature."""

    FORMAT = Struct(">H32s84s32s32s64s")

    commitment: bytes
    sealed: bytes
    self_commitment: bytes
    mask_commitment: bytes
    signature: bytes

    @property
    def digest(self) -> bytes:
        """Where this recipient's part of the sender's manifest comes from (SealedShare.digest)."""
        return sealed_digest(self)


@dataclass(frozen=True)
class OpenedShare(Record):
    """The two shares that one owner dealt another, in the clear. `owner` is the other end."""

    FORMAT = Struct(">H33s33s")

    self_share: bytes
    mask_share: bytes


@dataclass(frozen=True)
class Survivor(Record):
    """An owner whose whole upload arrived, and the digest of that upload."""

    FORMAT = Struct(">H32s")

    upload: bytes


@dataclass(frozen=True)
class Signed(Record):
    """An owner's signature. The message that carries the list says what is signed."""

    FORMAT = Struct(">H64s")

    signature: bytes


@dataclass(frozen=True)
class Nonce(Record):
    """What an owner drew for a check, once it had the models that the check is about.

    `signature`: the owner's, over it and what it had been sent (certificates.nonce_body).
    """

    FORMAT = Struct(">H32s64s")

    nonce: bytes
    signature: bytes


@dataclass(frozen=True)
class OpenedSeed(Record):
    """An owner's rebuilt secret: `kind` is b"s" for a survivor's self-mask seed, b"m" for the mask-key seed of an owner
    that dropped out.
    """

    FORMAT = Struct(">Hc32s")

    kind: bytes
    seed: bytes


@dataclass(frozen=True)
class RevealedShare(Record):
    """One share of one owner's secret: `kind` is b"s" for its self-mask seed, b"m" for its mask-key seed."""

    FORMAT = Struct(">Hc33s")

    kind: bytes
    share: bytes


def sealed_digest(share: SealedShare | ShareDelivery) -> bytes:
    """One recipient's part of a sender's manifest: SHA-256 of the sealed shares and of the commitments to them."""
    return hashlib.sha256(share.sealed + share.self_commitment + share.mask_commitment).digest()


def name_at(names: Sequence[str], index: int) -> str:
    """The owner at an index of the roster. Raises RemoteProtocolError if the roster is shorter."""
    if index >= len(names):  # check: owner-is-on-the-roster
        raise RemoteProtocolError(f"there is no owner {index} on a roster of {len(names)}")
    return names[index]
