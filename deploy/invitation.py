"""What a drafter sends to every owner: the agreement, where the server will be, and which certificate to trust.

Nothing in it is secret, and nothing is believed because it came in it: owners compare the agreement's fingerprint with
each other by phone, and whoever holds the certificate's key can stop a merge, but cannot read or change anything.
"""

from pathlib import Path
from typing import Annotated

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AfterValidator

from client.settings import Address
from common.agreement import Agreement
from common.errors import RuleError, SettingsError
from common.identity import fingerprint
from common.settings_file import Settings, parse_settings, read_toml
from deploy.network_keys import names_in, read_certificate

MAX_CERTIFICATE_CHARACTERS = 20_000
ASK_THE_DRAFTER = "ask the drafter for the invitation, which `amalgram draft --address HOST:PORT` writes"
HEADER = """\
# An invitation to: {title}
# The agreement's fingerprint, to compare with every other owner by phone: {fingerprint}
# Nothing in this file is secret. Each owner runs, in the folder with its keys: amalgram join {name}

"""


def _only_certificates(text: str) -> str:
    """The certificates in PEM text, and nothing else that may stand beside them."""
    if len(text) > MAX_CERTIFICATE_CHARACTERS:
        raise RuleError(f"has {len(text)} characters, the maximum is {MAX_CERTIFICATE_CHARACTERS}")
    try:
        certificates = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise RuleError("must be certificates in PEM form") from None
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in certificates)


class Door(Settings):
    """Where an owner's node connects, and whom it trusts to answer there."""

    address: Address
    root_certificate: Annotated[str, AfterValidator(_only_certificates)]  # PEM


class Invitation(Door):
    """`invitation.toml`."""

    agreement: Agreement


def read_door(address: str, root_certificate: Path) -> Door:
    """Raises SettingsError if an invitation cannot hold this address, HOST:PORT, or the certificate in this file."""
    try:
        certificate = root_certificate.read_text()
    except (OSError, ValueError):
        raise SettingsError(
            f"{root_certificate}: cannot be read, and an invitation holds the certificate that owners are to trust",
            hint=f"make it first: amalgram keys certificate {address.rpartition(':')[0]}",
        ) from None
    door = parse_settings({"address": address, "root_certificate": certificate}, Door, "invitation")
    served = root_certificate.with_name("server.pem")
    host = address.rpartition(":")[0].strip("[]")
    names = [str(name.value) for name in names_in(read_certificate(served))] if served.is_file() else [host]
    if host not in names:
        raise SettingsError(
            f"{served}: is for {', '.join(names)}, not for {host}, so owners could not connect to {address}",
            hint=f"make another: amalgram keys certificate {host}",
        )
    return door


def write_invitation(path: Path, door: Door, agreement: Agreement) -> None:
    """Write an invitation to an agreement, with a heading for whoever opens it."""
    invitation = Invitation(address=door.address, root_certificate=door.root_certificate, agreement=agreement)
    shown_digits = fingerprint(bytes.fromhex(agreement.digest()))
    header = HEADER.format(title=agreement.title, fingerprint=shown_digits, name=path.name)
    path.write_text(header + tomli_w.dumps(invitation.model_dump(mode="json", exclude_none=True)))


def read_invitation(path: Path) -> Invitation:
    """Raises SettingsError unless the file is an invitation to a complete agreement."""
    if not path.exists():
        raise SettingsError(f"{path}: there is no such file", hint=ASK_THE_DRAFTER)
    tables = read_toml(path)
    if "owners" in tables:
        raise SettingsError(
            f"{path}: is an agreement, not an invitation to one",
            hint=ASK_THE_DRAFTER,
        )
    return parse_settings(tables, Invitation, str(path))
