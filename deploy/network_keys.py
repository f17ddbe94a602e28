"""Keys and certificates for the network: an owner's node key, and a certificate for the coordinator's server.

They decide who may connect, and they encrypt the connection. The sum does not rely on them: it rests on identities and
masks.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import SettingsError, unreadable
from common.private_file import read_secret, write_key

if TYPE_CHECKING:
    from common.agreement import Agreement

LOCAL_NAMES = ("localhost", "127.0.0.1")  # where the coordinator's own programs connect
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
CA_DAYS, SERVER_DAYS, WARN_DAYS = 3650, 825, 30
log = logging.getLogger("amalgram.keys")

# --- an owner's node ---


@dataclass(frozen=True)
class NodeKey:
    """The key with which an owner's node proves itself to the server."""

    content: bytes = field(repr=False)  # of its file: secret
    public: str

    @classmethod
    def new(cls) -> "NodeKey":
        key = ec.generate_private_key(ec.SECP384R1())
        return cls(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _public_part(key))


def write_node_key(path: Path) -> str:
    """Write a new node key to `path` (0600) and return its public part. Raises SettingsError if the file exists."""
    key = NodeKey.new()
    write_key(path, key.content)
    return key.public


def read_node_key(path: Path) -> str:
    """The public part of the node key in `path`. Raises SettingsError if it is not one, or if others may read it."""
    content = read_secret(path)
    try:
        key = load_ssh_private_key(content, None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"{path}: is not a node key", hint="`amalgram keys new NAME` makes NAME.node")
    return _public_part(key)


def check_node_key(path: Path, name: str, agreement: "Agreement") -> None:
    """Raise SettingsError unless `path` holds the node key that the agreement names for this owner."""
    agreed = {entry.name: entry.node_key for entry in agreement.owners}
    if read_node_key(path) != agreed.get(name):  # check: node-key-is-agreed
        raise SettingsError(
            f"{path}: is not the node key that the agreement names for {name}",
            hint=f"use the {name}.node that was made together with the .pub file in the agreement",
        )


def _public_part(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


# --- the coordinator's server ---


def write_certificate(folder: Path, hosts: Sequence[str]) -> list[Path]:
    """Make server.key and server.pem for `hosts` (names or addresses) and this machine. Make ca.key and ca.pem too,
    unless the folder has them. Returns the files that it wrote. Raises SettingsError rather than overwrite one.
    """
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOCAL_NAMES))]
    ca_files, server_files = ([folder / f"{name}{end}" for end in (".key", ".pem")] for name in ("ca", "server"))
    for path in server_files:
        if path.exists():
            raise SettingsError(
                f"{path}: already exists, and a key is never overwritten", hint="choose another folder with --folder"
            )
    written = [path for path in (*ca_files, *server_files) if not path.exists()]
    if written == server_files:
        ca_key, ca = _read_key(ca_files[0]), read_certificate(ca_files[1])
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _certificate("Amalgram coordinator CA", ca_key, CA_DAYS)
        _write_pair(ca_files, ca_key, ca)
    key = ec.generate_private_key(ec.SECP256R1())
    _write_pair(server_files, key, _certificate(hosts[0], key, SERVER_DAYS, names, (ca_key, ca)))
    return written


def _certificate(
    common_name: str,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    names: Sequence[x509.GeneralName] = (),
    issuer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None = None,
) -> x509.Certificate:
    """A server's certificate, signed by `issuer`. Without an issuer, a CA's, signed by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    now = datetime.now(UTC)
    signer = key if issuer is None else issuer[0]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[1].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
        .add_extension(_key_usage(signs_certificates=issuer is None), critical=True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host):
            raise SettingsError(
                f"{host!r}: is not a host name or address", hint="use ASCII letters, and leave the port out"
            ) from None
    return x509.DNSName(host)


def _write_pair(files: Sequence[Path], key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    write_key(files[0], key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_key(files[1], certificate.public_bytes(Encoding.PEM), 0o644)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"{path}: is not an elliptic-curve key in PEM form without a password")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate in `path`. Raises SettingsError if there is none or it is not valid now, and logs a warning
    if it expires soon.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:
        raise SettingsError(f"{path}: is not a certificate in PEM form") from None
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if not start <= now <= end:
        raise SettingsError(
            f"{path}: is valid from {start:%Y-%m-%d} to {end:%Y-%m-%d} only, today is {now:%Y-%m-%d}",
            hint="make a new one with `amalgram keys certificate HOST`, or set this machine's clock",
        )
    if end - now < timedelta(days=WARN_DAYS):
        log.warning("%s expires on %s, in %d days: make a new one in time", path, f"{end:%Y-%m-%d}", (end - now).days)
    return certificate


def names_in(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    """The hosts and addresses that a certificate is for; none if it does not say."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def check_server_files(certificate_file: Path, key_file: Path, root_file: Path) -> None:
    """Raise SettingsError unless the server can start with these files and this machine's programs would trust it."""
    certificate, root = read_certificate(certificate_file), read_certificate(root_file)
    _check_belongs(certificate, certificate_file, key_file)
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        log.warning("%s did not issue %s: fine only if the latter holds the whole chain", root_file, certificate_file)
    if ip_address("127.0.0.1") not in names_in(certificate).get_values_for_type(x509.IPAddress):
        raise SettingsError(
            f"{certificate_file}: does not name 127.0.0.1, where the coordinator's own programs reach the server",
            hint="`amalgram keys certificate HOST` makes one that does",
        )


def _check_belongs(certificate: x509.Certificate, certificate_file: Path, key_file: Path) -> None:
    try:
        key = load_pem_private_key(read_secret(key_file), None)
    except (ValueError, TypeError):
        raise SettingsError(f"{key_file}: is not a key in PEM form without a password") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise SettingsError(f"{key_file}: is not the key of {certificate_file}")
