"""Who is who: long-lived Ed25519 identities, the text files they are kept in, fingerprints to compare by phone.

An identity file is secret and never leaves its machine. The public part goes into the agreement, by a way that people
trust; from then on nothing that a message says about who sent it is believed without a signature under that key.

    amalgram identity v1                 amalgram public identity v1
    name hotel                           name hotel
    secret <64 hexadecimal digits>       public <64 hexadecimal digits>
                                         node <OpenSSH EC P-384 public key>

The node key, an owner's only, is Flower's: by it the coordinator's server knows the machine. Nothing else rests on it.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.domain_separation import Domain
from common.errors import RemoteProtocolError, SettingsError

SECRET_FORM = re.compile(r"amalgram identity v1\nname ([a-z0-9][a-z0-9_-]{0,31})\nsecret ([0-9a-f]{64})\n")
PUBLIC_FORM = re.compile(
    r"amalgram public identity v1\nname ([a-z0-9][a-z0-9_-]{0,31})\npublic ([0-9a-f]{64})\n"
    r"(?:node (ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==)\n)?"
)
MAX_FILE_BYTES = 1000
FINGERPRINT_DIGITS, FINGERPRINT_GROUP = 40, 5  # 132 bits: too many for anybody to find a second key that matches


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One party's private key. Shows neither in a repr nor in a log."""

    name: str
    seed: bytes = field(repr=False)  # (32,)

    @property
    def public_key(self) -> bytes:
        """The Ed25519 public key, 32 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    def sign(self, label: Domain, session: bytes, body: bytes) -> bytes:
        """64 bytes over label | session | name | body."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(_signed_bytes(label, session, self.name, body))


def verify(public_key: bytes, label: Domain, session: bytes, name: str, body: bytes, signature: bytes) -> None:
    """Raise RemoteProtocolError unless `signature` is that of `name`'s key over exactly this."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed_bytes(label, session, name, body))
    except (InvalidSignature, ValueError):
        what = label.value.decode().strip().removeprefix("amalgram v1 ")
        raise RemoteProtocolError(f"the signature of {name} does not hold ({what})") from None


def _signed_bytes(label: Domain, session: bytes, name: str, body: bytes) -> bytes:
    # Every variable part but the last is preceded by its length, so that no two inputs give the same bytes.
    encoded = name.encode()
    return label.value + bytes([len(session), len(encoded)]) + session + encoded + body


def fingerprint(data: bytes) -> str:
    """40 decimal digits in groups of five, short enough to be read out by phone."""
    number = int.from_bytes(hashlib.sha256(Domain.FINGERPRINT.value + data).digest())
    digits = str(number % 10**FINGERPRINT_DIGITS).zfill(FINGERPRINT_DIGITS)
    return " ".join(digits[i : i + FINGERPRINT_GROUP] for i in range(0, FINGERPRINT_DIGITS, FINGERPRINT_GROUP))


# --- files ---


@dataclass(frozen=True, kw_only=True)
class PublicIdentity:
    """What a party shows of itself: its Ed25519 key (32 bytes) and, of an owner, the key of its Flower node."""

    name: str
    public_key: bytes
    node_key: str | None = None


def write_identity(path: Path, identity: Identity, node_key: str | None = None) -> None:
    """Write the secret file (0600) and, beside it, the public one (`.pub`). Raises SettingsError if either exists."""
    secret = f"amalgram identity v1\nname {identity.name}\nsecret {identity.seed.hex()}\n"
    public = f"amalgram public identity v1\nname {identity.name}\npublic {identity.public_key.hex()}\n"
    public += f"node {node_key}\n" if node_key else ""
    public_path = path.with_suffix(".pub")
    if public_path == path:
        raise SettingsError(f"{path}: .pub is the name of the public file; give the secret one another ending")
    write_new(path, secret.encode(), 0o600)
    write_new(public_path, public.encode(), 0o644)


def read_identity(path: Path) -> Identity:
    """An identity from its secret file. Raises SettingsError if it is none, or if others may read it."""
    content = _read(path)
    if path.stat().st_mode & 0o077:
        raise SettingsError(f"{path}: others may read this secret; close it: chmod 600 {path}")
    found = SECRET_FORM.fullmatch(content)
    if found is None:
        raise SettingsError(f"{path}: is no amalgram identity (hint: `amalgram keys new NAME` makes one)")
    return Identity(name=found[1], seed=bytes.fromhex(found[2]))


def read_public_identity(path: Path) -> PublicIdentity:
    """What a public file says. Raises SettingsError if it is none."""
    found = PUBLIC_FORM.fullmatch(_read(path))
    if found is None:
        raise SettingsError(
            f"{path}: is no public identity (hint: `amalgram keys new` writes NAME.pub beside NAME.key)"
        )
    return PublicIdentity(name=found[1], public_key=bytes.fromhex(found[2]), node_key=found[3])


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None


def write_new(path: Path, content: bytes, mode: int) -> None:
    """A file that was not there before: O_EXCL, so that no key is ever overwritten and no link is followed."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise SettingsError(f"{path}: is there already, and a key is never overwritten; name another file") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
