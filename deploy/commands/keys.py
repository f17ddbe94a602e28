"""`amalgram keys`: makes a party's keys and the server's certificate, and shows the fingerprint of either."""

import secrets
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import TypeAdapter, ValidationError

from common.errors import SettingsError
from common.identity import Identity, fingerprint, read_identity, read_public_identity, write_identity
from common.names import COORDINATOR, NAME_RULE, TAKEN_NAMES
from common.settings_file import Name
from deploy.network_keys import read_certificate, write_certificate, write_node_key
from deploy.terminal import answer, as_lines


def make_keys(name: str, folder: Path) -> None:
    """Write NAME.key, NAME.pub and, for an owner, NAME.node. Raises SettingsError rather than overwrite a key."""
    _check_name(name)
    key, public, node = (folder / f"{name}{ending}" for ending in (".key", ".pub", ".node"))
    if key.exists():
        raise SettingsError(
            f"{key}: already exists, and a key is never overwritten", hint="choose another folder with --folder"
        )
    node_key = None if name == COORDINATOR else write_node_key(node)
    write_identity(key, Identity(name=name, seed=secrets.token_bytes(32)), node_key)
    secret = [str(key)] if node_key is None else [str(key), str(node)]
    found = _identity(public)
    hint = (
        f"{' and '.join(secret)}: secret, never move {'it' if len(secret) == 1 else 'them'} off this machine\n"
        f"{public}: send it to whoever drafts the agreement"
    )
    answer(found | {"public": str(public), "secret": secret}, as_lines(found), hint)


def make_certificate(hosts: list[str], folder: Path) -> None:
    """Write server.key and server.pem for `hosts`, and ca.key and ca.pem unless the folder has them."""
    written = [str(path) for path in write_certificate(folder, hosts)]
    hint = (
        f"{folder / 'ca.pem'}: for every owner; `amalgram draft --address HOST:PORT` puts it into the invitation\n"
        f"{folder / 'server.key'}: secret, it stays with the server\n"
        f"{folder / 'ca.key'}: secret, whoever has it can impersonate the server; keep it elsewhere, for the next "
        "certificate"
    )
    answer({"written": written}, "\n".join(written), hint)


def show_fingerprint(path: Path) -> None:
    """Print the fingerprint of an identity or a certificate."""
    found = _certificate(path) if path.suffix == ".pem" else _identity(path)
    answer(found, as_lines(found))


def _check_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise SettingsError(f"{name!r} is not a name", hint=f"a name has {NAME_RULE}") from None
    if name in TAKEN_NAMES and name != COORDINATOR:
        raise SettingsError(f"{name!r} is {TAKEN_NAMES[name]} name", hint="choose another name")


def _certificate(path: Path) -> dict[str, str]:
    certificate = read_certificate(path)
    return {
        "certificate": certificate.subject.rfc4514_string(),
        "valid_until": f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        "fingerprint": fingerprint(certificate.public_bytes(Encoding.DER)),
    }


def _identity(path: Path) -> dict[str, str]:
    party = read_public_identity(path) if path.suffix == ".pub" else read_identity(path)
    return {"name": party.name, "public_key": party.public_key.hex(), "fingerprint": fingerprint(party.public_key)}
