"""A masked sum of which no owner may be missing, and which everybody adds up: pair masks alone hide the vectors.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), section 4, "Masking with one-time pads". Owners and coordinator
both run it, for checks (common/verification.py): shares add up to zero only over all who contributed. So nobody may
drop out, and no secret is ever rebuilt. There are no self masks, no shares of seeds and no list of survivors, and the
sum takes two exchanges, which travel with the set-up of the next one.

    coordinator -> owner    owner -> coordinator
    Draw                    Drawn                 a fresh X25519 key, signed with the digest of all that was delivered
    CheckKeys               CheckShares           everybody's keys; y_i, signed with the digest of all this
    UploadsOpened           OpeningChecked        everybody's y_i and signatures; each owner adds them up

Owner i sends y_i = x_i + sum over j > i of PRG(k_ij) - sum over j < i of PRG(k_ij), once. Its numbers are integers of
256 bits (wide.py), and all this is modulo 2^256. k_ij follows from the two keys and from `PairwiseSum.digest`: the run,
the round, everything that was delivered, and all keys. So if owners are told different things, their masks do not
cancel, and what they sent is noise. Masks cancel only over all owners of one list of keys, and each of them checks that
these are the owners whose contributions are merged.

What this does not protect against: what the total itself reveals; an owner that adds a false vector; anybody who
refuses to continue.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from common.certificates import nonce_body
from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.identity import Identity, verify
from common.summation import key_agreement, mask_stream, wide
from common.summation.protocol import Total
from common.summation.records import Nonce, Signed, name_at
from common.tensor_layout import TensorLayout


def public_key(seed: bytes, run: str) -> bytes:
    """What an owner shows the others of a fresh `seed`, 32 bytes."""
    return key_agreement.public_key(seed, Domain.CHECK_KEY, bytes.fromhex(run))


def verify_nonce(key: bytes, owner: str, run: str, position: int, delivered: str, nonce: Nonce) -> None:
    """Raise RemoteProtocolError unless `owner` drew it for `position`, after it had been sent exactly `delivered`."""
    body = nonce_body(position, delivered, nonce.nonce)
    verify(key, Domain.SIGN_NONCE, bytes.fromhex(run), owner, body, nonce.signature)


@lru_cache(maxsize=4)  # in a simulation, all owners read the same keys
def _entries(names: tuple[str, ...], keys: bytes) -> Mapping[str, Nonce]:
    return MappingProxyType({name_at(names, each.owner): each for each in Nonce.unpack_all(keys)})


@dataclass(frozen=True, kw_only=True)
class PairwiseSum:
    """One such sum, once all keys are there. `delivered`: the digest of everything that was delivered before.

    `keys`: `records.Nonce` of every owner that takes part: its public key, and its signature (`verify_nonce`).
    """

    run: str
    position: int
    delivered: str
    layout: TensorLayout
    roster: Mapping[str, bytes]  # owner -> Ed25519 public key, in the agreement's order
    keys: bytes

    @cached_property
    def entries(self) -> Mapping[str, Nonce]:
        """Owner -> its key."""
        return _entries(tuple(self.roster), self.keys)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that no other sum has."""
        about = bytes.fromhex(self.run) + self.position.to_bytes(8) + bytes.fromhex(self.delivered)
        return hashlib.sha256(Domain.CHECK_KEYS.value + about + self.keys).digest()  # check: masks-are-of-one-check

    @property
    def session(self) -> str:
        """What UploadsOpened calls the sum."""
        return self.digest.hex()

    def check(self, owners: tuple[str, ...]) -> None:
        """Raise RemoteProtocolError unless the keys are those of exactly `owners`, each drawn for this sum."""
        if tuple(self.entries) != owners:  # check: checked-by-all-contributors
            raise RemoteProtocolError("the coordinator made a check without all owners whose contributions are merged")
        for name, each in self.entries.items():
            verify_nonce(
                self.roster[name], name, self.run, self.position, self.delivered, each
            )  # check: check-keys-are-signed

    def masked(self, seed: bytes, me: str, vector: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """y_i: `vector` (layout.size,), the words of all numbers, masked; `seed` is that of this owner's key."""
        private = key_agreement.private_key(seed, Domain.CHECK_KEY, bytes.fromhex(self.run))
        mine = self.entries[me].owner
        payload = vector.reshape(-1, wide.WORDS)
        for each in self.entries.values():
            if each.owner != mine:
                key = self._pair_key(key_agreement.agree(private, each.nonce), mine, each.owner)
                mask = np.zeros(self.layout.size, dtype="<u8")
                mask_stream.add_masks(mask, [(key, 1)], 0)
                change = wide.add if mine < each.owner else wide.subtract
                payload = change(payload, mask.reshape(-1, wide.WORDS))  # check: check-shares-are-masked
        return payload.reshape(-1)

    def sign(self, identity: Identity, payload: NDArray) -> bytes:
        """An owner's signature under its y_i."""
        return identity.sign(Domain.SIGN_CHECK_SHARES, bytes.fromhex(self.run), self._body(payload))

    def check_upload(self, owner: str, payload: NDArray, signature: bytes) -> None:
        """Raise RemoteProtocolError unless `payload` is a vector that `owner` signed for this sum."""
        if payload.dtype != self.layout.dtype or payload.shape != (self.layout.size,):  # check: check-shares-are-whole
            raise RemoteProtocolError(f"check: the vector of {owner} has another shape than was agreed")
        body = self._body(payload)
        verify(
            self.roster[owner], Domain.SIGN_CHECK_SHARES, bytes.fromhex(self.run), owner, body, signature
        )  # check: check-shares-are-signed

    def total(self, payload: NDArray, signatures: bytes) -> Total:
        """The total of all y_i, one after the other in `payload`, with everybody's `signatures` (`records.Signed`).

        The words of a number stay beside each other, as they are, in the total's float64 vector. Raises
        RemoteProtocolError unless each y_i is the one that its owner signed.
        """
        signed, size = Signed.unpack_all(signatures), self.layout.size
        owners = [each.owner for each in self.entries.values()]
        is_whole = [each.owner for each in signed] == owners and payload.shape == (len(owners) * size,)
        if not is_whole:  # check: check-shares-are-of-all
            raise RemoteProtocolError("check: not one signed vector of every owner")
        words = np.zeros((size // wide.WORDS, wide.WORDS), dtype="<u8")
        for number, (name, each) in enumerate(zip(self.entries, signed, strict=True)):
            upload = payload[number * size : (number + 1) * size]
            self.check_upload(name, upload, each.signature)
            words = wide.add(words, upload.reshape(-1, wide.WORDS))
        vector = words.reshape(-1).view("<f8")
        return Total(layout=self.layout, vector=vector, owners=tuple(self.entries), roster_size=len(self.roster))

    def _pair_key(self, shared: bytes, mine: int, other: int) -> bytes:
        pair = min(mine, other).to_bytes(2) + max(mine, other).to_bytes(2)
        return key_agreement.derive(shared, Domain.CHECK_MASK, self.digest, pair, mask_stream.KEY_BYTES)

    def _body(self, payload: NDArray) -> bytes:
        return self.digest + hashlib.sha256(np.ascontiguousarray(payload).data).digest()
