"""Long-lived Ed25519 identities, the text files that hold them, and fingerprints to compare by phone.

An identity file is secret and never leaves its machine. Its public part goes into the agreement over a channel that
people trust. From then on, a claim in a message about its sender counts only with a signature under that key.

    amalgram identity v1                 amalgram public identity v1
    name hotel                           name hotel
    secret <64 hexadecimal digits>       public <64 hexadecimal digits>
                                         node <OpenSSH EC P-384 public key>

Only owners have a node key. It belongs to Flower: the coordinator's server recognises the owner's machine by it. No
promise about privacy rests on it.
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.domain_separation import Domain
from common.errors import RemoteProtocolError, RuleError, SettingsError, unreadable
from common.names import NAME_PATTERN
from common.private_file import read_secret, write_key

SECRET_FORM = re.compile(rf"amalgram identity v1\nname ({NAME_PATTERN})\nsecret ([0-9a-f]{{64}})\n")
PUBLIC_FORM = re.compile(
    rf"amalgram public identity v1\nname ({NAME_PATTERN})\npublic ([0-9a-f]{{64}})\n"
    r"(?:node (ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==)\n)?"
)
MAX_FILE_BYTES = 1000
FINGERPRINT_DIGITS, FINGERPRINT_GROUP = 40, 5  # 132 bits: nobody can find a second key that matches
FIELD_PRIME, SIGN_BIT = 2**255 - 19, 2**255
ORDER_EIGHT = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y-coordinates of the points of order 1, 2, 4 and 8 on Ed25519. Under such a key, anybody can sign some messages.
LOW_ORDER = {0, 1, FIELD_PRIME - 1, ORDER_EIGHT, FIELD_PRIME - ORDER_EIGHT}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One party's private key. A repr does not show it."""

    name: str
    seed: bytes = field(repr=False)  # (32,)

    @property
    def public_key(self) -> bytes:
        """The Ed25519 public key, 32 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    def sign(self, domain: Domain, session: bytes, body: bytes) -> bytes:
        """Sign domain | session | name | body: 64 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(_signed_bytes(domain, session, self.name, body))


def check_public_key(public_key: bytes) -> None:
    """Raise RuleError for an Ed25519 key that is a point of low order, or not in its canonical encoding (RFC 8032)."""
    coordinate = int.from_bytes(public_key, "little") % SIGN_BIT
    if coordinate >= FIELD_PRIME or coordinate in LOW_ORDER:  # check: identity-key-is-strong
        raise RuleError(
            "a weak key, under which others could sign: a point of low order, or not in its canonical encoding",
            hint="`amalgram keys new NAME` makes a good one",
        )


def verify(public_key: bytes, domain: Domain, session: bytes, name: str, body: bytes, signature: bytes) -> None:
    """Raise RemoteProtocolError unless `signature` was made with `name`'s key over exactly these values."""
    try:
        _verify(public_key, signature, _signed_bytes(domain, session, name, body))
    except (InvalidSignature, ValueError):
        purpose = domain.value.decode().strip().removeprefix("amalgram v1 ")
        raise RemoteProtocolError(f"the signature of {name} is not valid ({purpose})") from None


@lru_cache(maxsize=1 << 14)  # in a simulation, all owners verify the same signatures; only valid ones are kept
def _verify(public_key: bytes, signature: bytes, signed: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed)


def _signed_bytes(domain: Domain, session: bytes, name: str, body: bytes) -> bytes:
    # The lengths of all variable parts but the last come first, so no two inputs give the same bytes.
    encoded = name.encode()
    return domain.value + bytes([len(session), len(encoded)]) + session + encoded + body  # check: session-is-signed


def fingerprint(data: bytes) -> str:
    """40 decimal digits in groups of five, short enough to read out by phone."""
    number = int.from_bytes(hashlib.sha256(Domain.FINGERPRINT.value + data).digest())
    digits = str(number % 10**FINGERPRINT_DIGITS).zfill(FINGERPRINT_DIGITS)
    return " ".join(digits[i : i + FINGERPRINT_GROUP] for i in range(0, FINGERPRINT_DIGITS, FINGERPRINT_GROUP))


# --- files ---


@dataclass(frozen=True, kw_only=True)
class PublicIdentity:
    """What a party shows: its Ed25519 key (32 bytes) and, if it is an owner, the key of its Flower node."""

    name: str
    public_key: bytes
    node_key: str | None = None


def write_identity(path: Path, identity: Identity, node_key: str | None = None) -> None:
    """Write the secret file (0600) and the public one beside it (`.pub`). Raises SettingsError if either exists."""
    secret = f"amalgram identity v1\nname {identity.name}\nsecret {identity.seed.hex()}\n"
    public = f"amalgram public identity v1\nname {identity.name}\npublic {identity.public_key.hex()}\n"
    public += f"node {node_key}\n" if node_key else ""
    public_path = path.with_suffix(".pub")
    if public_path == path:
        raise SettingsError(
            f"{path}: the public file takes the ending .pub", hint="choose another ending for the secret file"
        )
    write_key(path, secret.encode())
    write_key(public_path, public.encode(), 0o644)


def read_identity(path: Path) -> Identity:
    """Read a secret file. Raises SettingsError if it is not an identity, or if other users may read it."""
    if path.suffix == ".pub":
        secret = path.with_suffix(".key").name
        raise SettingsError(
            f"{path}: is the public file of an identity", hint=f"name its secret file, usually {secret}"
        )
    found = SECRET_FORM.fullmatch(read_secret(path).decode("ascii", errors="replace"))
    if found is None:
        raise SettingsError(f"{path}: not an amalgram identity", hint="`amalgram keys new NAME` makes one")
    return Identity(name=found[1], seed=bytes.fromhex(found[2]))


def read_public_identity(path: Path) -> PublicIdentity:
    """Read a public file. Raises SettingsError if it is not a public identity."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from None
    found = PUBLIC_FORM.fullmatch(content)
    if found is None:
        raise SettingsError(
            f"{path}: not a public identity", hint="`amalgram keys new NAME` writes NAME.pub beside NAME.key"
        )
    public_key = bytes.fromhex(found[2])
    try:
        check_public_key(public_key)
    except RuleError as weak:
        raise SettingsError(f"{path}: {weak}", hint=weak.hint) from None
    return PublicIdentity(name=found[1], public_key=public_key, node_key=found[3])
