"""`amalgram draft`: completes what people wrote into the agreement that every party then holds."""

from pathlib import Path

from common.agreement import AgreementDraft
from common.errors import SettingsError
from common.identity import PublicIdentity, fingerprint, read_public_identity
from common.models.folders import model_folder
from common.settings_file import load_settings, write_settings
from deploy.drafting import with_keys, with_labels
from deploy.terminal import answer, as_lines


def draft_agreement(short: Path, public: list[Path], out: Path) -> None:
    """Write the agreement to `out`. Raises SettingsError if that exists or a party's key is missing, ModelError if the
    base model cannot be used.
    """
    if out.exists():
        raise SettingsError(f"{out}: exists already", hint="name another file with --out")
    written = load_settings(short, AgreementDraft)
    identities = _by_name(public)
    base_folder = model_folder(written.base, short.resolve().parent, written.base_revision)
    public_keys = {name: each.public_key for name, each in identities.items()}
    node_keys = {name: each.node_key for name, each in identities.items() if each.node_key is not None}
    with_keys(with_labels(written, base_folder, models={}), public_keys, node_keys)
    from deploy.complete import complete_agreement  # torch: not before what people wrote is checked

    agreement = complete_agreement(written, base_folder, public_keys, node_keys)
    write_settings(out, agreement)
    found = {"agreement": str(out), "fingerprint": fingerprint(bytes.fromhex(agreement.digest()))}
    hint = "give this file to every party; each owner reads it and consents: amalgram agree OWNER.toml"
    if agreement.summation.kind == "masked" and agreement.colluders == 0:
        hint += "\nno owner may collude with the coordinator, so it must be none of them, and work for none"
    answer(found | {"digest": agreement.digest()}, as_lines(found), hint)


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
