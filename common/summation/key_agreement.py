"""How two owners agree on a secret and seal small messages under it: X25519, HKDF-SHA256, AES-256-GCM.

Every key lives for one session. A private key is derived from a 32-byte seed. The seed of a mask key is shared among
the neighbours; whoever rebuilds it can rebuild the key and check it against the advertised one.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.domain_separation import Domain
from common.errors import RemoteProtocolError

SEED_BYTES = 32
KEY_BYTES = 32
TAG_BYTES = 16
# A sealing key is derived for one direction of one pair in one session, and seals one message: the nonce is never
# used twice.
ONLY_NONCE = bytes(12)
FIELD_PRIME = 2**255 - 19
# The points of order 1, 2, 4 and 8 on Curve25519 and its twist (Cremers and Jackson, CSF 2019, table I). With one of
# them, the secret of a pair would be zero, known to everybody.
LOW_ORDER = {
    0,
    1,
    FIELD_PRIME - 1,
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
}


def derive(secret: bytes, domain: Domain, salt: bytes, info: bytes = b"", length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) with info = domain | info."""
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=domain.value + info).derive(secret)


def private_key(seed: bytes, domain: Domain, session: bytes) -> X25519PrivateKey:
    """The private key for `seed` in `session`; `domain` separates channel keys from mask keys."""
    return X25519PrivateKey.from_private_bytes(derive(seed, domain, session))


def public_key(seed: bytes, domain: Domain, session: bytes) -> bytes:
    """The public key of `private_key`, 32 bytes."""
    return private_key(seed, domain, session).public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The secret that both ends compute, 32 bytes. Raises RemoteProtocolError for a low-order point (RFC 7748, 6.1)."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # the shared secret would be all zeros
        raise RemoteProtocolError("a public key is a point of low order") from None  # check: no-low-order-point


def check_public_key(public: bytes) -> None:
    """Raise RemoteProtocolError for a point of low order, or one that has another encoding than this.

    X25519 ignores the highest bit and reduces the rest (RFC 7748, section 5). With a second encoding, one owner could
    advertise another's key as its own.
    """
    coordinate = int.from_bytes(public, "little")
    if coordinate >= FIELD_PRIME:  # check: key-has-one-encoding
        raise RemoteProtocolError("a public key is not in its canonical encoding")
    if coordinate in LOW_ORDER:  # check: advertised-key-is-of-high-order
        raise RemoteProtocolError("a public key is a point of low order")


def seal(key: bytes, plain: bytes, associated: bytes) -> bytes:
    """Encrypt with AES-256-GCM: `len(plain) + 16` bytes. `key` must not have sealed anything before."""
    return AESGCM(key).encrypt(ONLY_NONCE, plain, associated)


def open_sealed(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The plain text. Raises RemoteProtocolError unless it was sealed with this key and this associated data."""
    try:
        return AESGCM(key).decrypt(ONLY_NONCE, sealed, associated)
    except InvalidTag:
        raise RemoteProtocolError("a sealed share cannot be opened") from None
