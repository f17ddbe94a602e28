"""`amalgram draft`: completes what people wrote into the agreement that every party then holds."""

from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

from common.agreement import AgreementDraft
from common.errors import SettingsError
from common.identity import PublicIdentity, fingerprint, read_public_identity
from common.models.folders import model_folder
from common.settings_file import load_settings, write_settings
from deploy.drafting import pool_of, with_keys, with_labels, with_layers, with_pool
from deploy.invitation import read_door, write_invitation
from deploy.terminal import answer, as_lines

COORDINATOR_SETTINGS = """\
# The coordinator's settings. Paths are relative to this file.
agreement = "{agreement}"
output = "output"             # where the merged model and the report go
# base = "base"               # your copy of the base model, if it is not where the agreement says

[network]
listen = "{listen}:{port}"  # {who}
"""
EVERYWHERE = "0.0.0.0", "let only this port in, from the owners' addresses"
THIS_MACHINE = "127.0.0.1", "this machine alone, as the address says; 0.0.0.0 for owners elsewhere"


def draft_agreement(short: Path, public: list[Path], out: Path, address: str | None, adapters: Sequence[Path]) -> None:
    """Write the agreement to `out`; if `address`, HOST:PORT, says where the server will be, an invitation to it, too.
    `adapters`: owners' LoRA adapters; then nothing else than what they change is merged.

    Raises SettingsError if a file exists or a party's key is missing, ModelError if the base model cannot be used.
    """
    invitation = out.with_name(f"{out.stem.replace('agreement', 'invitation')}.toml")  # agreement-2: invitation-2
    coordinator = out.with_name("coordinator.toml")
    for path in (out, invitation) if address else (out,):
        if path.exists():
            raise SettingsError(f"{path}: exists already", hint="move it away, or name another file with --out")
    door = read_door(address, out.with_name("ca.pem")) if address else None
    written = with_layers(load_settings(short, AgreementDraft), adapters)
    base_folder = model_folder(written.base, short.resolve().parent, written.base_revision)
    pool = pool_of(written, short.resolve().parent)
    written = with_pool(written, pool, base_folder)
    identities = _by_name(public)
    public_keys = {name: each.public_key for name, each in identities.items()}
    node_keys = {name: each.node_key for name, each in identities.items() if each.node_key is not None}
    labelled = with_labels(written, base_folder, models={})
    with_keys(labelled, public_keys, node_keys)
    from deploy.complete import check_adapters, complete_agreement  # torch: not before what people wrote is checked

    check_adapters(labelled, base_folder, [("--adapter", folder) for folder in adapters])
    agreement = complete_agreement(written, base_folder, public_keys, node_keys)
    write_settings(out, agreement)
    found = {"agreement": str(out), "fingerprint": fingerprint(bytes.fromhex(agreement.digest()))}
    hint = "give this file to every party; each owner reads it and consents: amalgram agree OWNER.toml"
    if door is not None:
        write_invitation(invitation, door, agreement)
        hint = f"send {invitation} to every owner, who joins with it: amalgram join {invitation.name}"
        if not coordinator.exists():
            host, _, port = door.address.rpartition(":")
            listen, who = THIS_MACHINE if is_loopback(host) else EVERYWHERE
            settings = COORDINATOR_SETTINGS.format(agreement=out.name, listen=listen, port=port, who=who)
            coordinator.write_text(settings)
            hint += f"\nwrote {coordinator}; start the server: amalgram server {coordinator}"
        else:
            hint += f'\n{coordinator} stays as it is: change it to agreement = "{out.name}" and to an output of its own'
            hint += f", then start the server again: amalgram server {coordinator}"
    if pool is not None:
        hint += f"\nwith it goes {pool.name}, which every party puts beside its agreement"
    if agreement.summation.kind == "masked" and agreement.colluders == 0:
        hint += "\nno owner may collude with the coordinator, so it must be none of them, and work for none"
    answer(found | {"digest": agreement.digest()}, as_lines(found), hint)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for everybody: localhost, or 127.0.0.0/8."""
    try:
        return host == "localhost" or IPv4Address(host).is_loopback
    except ValueError:
        return False


def _by_name(paths: list[Path]) -> dict[str, PublicIdentity]:
    identities: dict[str, PublicIdentity] = {}
    for path in paths:
        identity = read_public_identity(path)
        if identity.name in identities:
            raise SettingsError(
                f"{path}: {identity.name!r} has a public key already", hint="give one .pub file per party"
            )
        identities[identity.name] = identity
    return identities
