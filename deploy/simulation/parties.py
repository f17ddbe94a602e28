"""The parties of a simulation: their keys, settings and state, in one folder of its output while it lasts."""

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from client.owner import Owner
from client.settings import OwnerNetwork, OwnerSettings
from common.agreement import COORDINATOR, Agreement, AgreementDraft
from common.errors import HelperEnded
from common.identity import Identity, read_identity, write_identity
from common.models.folders import fine_tuned_folder, model_folder
from common.private_file import read_secret, write_key
from common.settings_file import load_settings, write_settings
from deploy.commands.agree import give_consent
from deploy.launch.processes import free_port
from deploy.network_keys import NodeKey, read_node_key, write_certificate
from server.checkpoint import is_checkpoint_of
from server.output_folder import CHECKPOINT

PARTIES = "parties"
SECRETS = ("*.key", "*.node", "*.ledger*")


@dataclass(frozen=True)
class PartyKeys:
    """Keys of all parties, by name. Only a network has nodes."""

    identities: Mapping[str, Identity]
    nodes: Mapping[str, NodeKey]

    @property
    def public_keys(self) -> dict[str, bytes]:
        return {name: identity.public_key for name, identity in self.identities.items()}

    @property
    def node_keys(self) -> dict[str, str]:
        return {name: node.public for name, node in self.nodes.items()}


def party_keys(draft: AgreementDraft, parties: Path, *, with_nodes: bool) -> PartyKeys:
    """Keys for all parties of a simulation: those that an interrupted one left in `parties`, or fresh ones."""
    names, nodes = (*draft.owner_names, COORDINATOR), draft.owner_names if with_nodes else ()
    keys = {name: parties / f"{name}.key" for name in names}
    node_keys = {name: parties / f"{name}.node" for name in nodes}
    if all(path.is_file() for path in (*keys.values(), *node_keys.values())):
        return PartyKeys(
            identities={name: read_identity(path) for name, path in keys.items()},
            nodes={name: NodeKey(read_secret(path), read_node_key(path)) for name, path in node_keys.items()},
        )
    return PartyKeys(
        identities={name: Identity(name=name, seed=secrets.token_bytes(32)) for name in names},
        nodes={name: NodeKey.new() for name in nodes},
    )


@contextmanager
def set_up_parties(
    output: Path,
    agreement: Agreement,
    base_folder: Path,
    owner_files: Mapping[str, Path],
    keys: PartyKeys,
    pool: Path | None = None,
) -> Iterator[tuple[Path, list[Path]]]:
    """Give every party its settings, its keys and the one agreement, and consent to it for each owner: whoever runs a
    simulation has everything in hand. Take the owners' state and the keys away afterwards, unless the run was
    interrupted and can go on.
    """
    parties, checkpoint = output / PARTIES, output / CHECKPOINT
    if not is_checkpoint_of(checkpoint, agreement.digest()):
        shutil.rmtree(parties, ignore_errors=True)
    parties.mkdir(parents=True, exist_ok=True)
    write_settings(parties / "agreement.toml", agreement)
    port = free_port() if keys.nodes else None
    try:
        _write_keys(parties, keys)
        coordinator_file = _write_coordinator(parties, output, base_folder, port, pool)
        party_files = []
        for name, path in owner_files.items():
            settings = load_settings(path, OwnerSettings)
            party_files.append(parties / f"{name}.toml")
            write_settings(party_files[-1], _placed(settings, path.parent, base_folder, port, pool))
            give_consent(Owner(party_files[-1]))
        yield coordinator_file, party_files
    except HelperEnded:  # as if this process had been killed
        raise
    except Exception:
        shutil.rmtree(parties, ignore_errors=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    for folder in (parties / "state", parties / "server-state"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (path for pattern in SECRETS for path in parties.glob(pattern)):
        path.unlink(missing_ok=True)


def _write_keys(parties: Path, keys: PartyKeys) -> None:
    for name, identity in keys.identities.items():
        if not (parties / f"{name}.key").exists():
            write_identity(parties / f"{name}.key", identity)
    for name, node in keys.nodes.items():
        if not (parties / f"{name}.node").exists():
            write_key(parties / f"{name}.node", node.content)
    if keys.nodes and not (parties / "server.pem").exists():
        write_certificate(parties, ["localhost"])


def _write_coordinator(parties: Path, output: Path, base_folder: Path, port: int | None, pool: Path | None) -> Path:
    settings: dict[str, Any] = {"agreement": "agreement.toml", "output": str(output), "base": str(base_folder)}
    if port is not None:
        settings |= {"threads": torch.get_num_threads(), "network": {"listen": f"127.0.0.1:{port}"}}
    if pool is not None:
        settings |= {"pool": str(pool)}
    (parties / "coordinator.toml").write_text(tomli_w.dumps(settings))
    return parties / "coordinator.toml"


def _placed(
    settings: OwnerSettings, home: Path, base_folder: Path, port: int | None, pool: Path | None
) -> OwnerSettings:
    """An owner's settings as they read from the simulation's own folder: absolute paths, its own state.

    On a network it computes with as many threads as this process, so that the last bits are the same.
    """
    data = settings.data
    placed_data = data.model_copy(
        update={
            split: home / path
            for split, path in (("train", data.train), ("validation", data.validation), ("test", data.test))
            if path is not None
        }
    )
    return settings.model_copy(
        update={
            "agreement": Path("agreement.toml"),
            "state": Path("state") / settings.name,
            "identity": Path(f"{settings.name}.key"),
            "base": str(base_folder if settings.base is None else model_folder(settings.base, home)),
            "own_base": None if settings.own_base is None else str(model_folder(settings.own_base, home)),
            "pool": pool if settings.pool is None else home / settings.pool,
            "fine_tuned": None if settings.fine_tuned is None else str(fine_tuned_folder(settings.fine_tuned, home)),
            "data": placed_data,
            "threads": settings.threads if port is None else torch.get_num_threads(),
            "network": None if port is None else OwnerNetwork(address=f"127.0.0.1:{port}"),
        }
    )
