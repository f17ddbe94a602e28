"""`amalgram client`: an owner's node, which runs the consented bundle and nothing else, and comes back after any loss.

What it keeps is in the owner's state folder (0700): `node/`, with Flower's home, a secret, logs.
"""

import logging
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.owner import Owner
from client.settings import OwnerNetwork
from common.errors import ConsentError, SettingsError
from common.private_file import make_private_folder, write_whole
from deploy.commands.keys import read_certificate, read_node_key
from deploy.launch.flower import flower_environment
from deploy.launch.internals import MARK, check_internals
from deploy.launch.processes import POLL_SECONDS, FollowedFile, Process, alone, free_port, started

RETRY_SECONDS = 5.0
NO_CONNECTION = "Failed to initialize the connection"  # the SuperNode's words; the next line has the reason
REFUSED = " refused"  # the owner's app says no more than that: the reason may quote a row
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
log = logging.getLogger("amalgram.client")


@dataclass(frozen=True)
class Node:
    """One owner's node, checked: everything that its processes need to know."""

    settings_file: Path
    state: Path
    address: str
    root_certificate: Path
    key: Path
    bundle_digest: str


def find_node(settings_file: Path) -> Node:
    """Check an owner's side. Raises ConsentError unless its owner consented to the agreement that its file names, and
    SettingsError for keys that are not the agreed ones.
    """
    owner = Owner(settings_file)
    network = owner.settings.network
    if network is None:
        raise SettingsError(f'{settings_file}: has no [network] table; it needs at least address = "HOST:PORT"')
    agreement = owner.agreement
    if agreement.digest() not in owner.state.consents():
        raise ConsentError(f"{owner.name} has not consented to this agreement: amalgram agree {settings_file}")
    home = settings_file.resolve().parent
    key, root = _key_file(network, owner.name, home), home / network.root_certificate
    agreed = {entry.name: entry.node_key for entry in agreement.owners}
    if read_node_key(key) != agreed.get(owner.name):
        raise SettingsError(f"{key}: is not the node key that the agreement names for {owner.name}")
    read_certificate(root)
    return Node(
        settings_file=settings_file.resolve(),
        state=owner.state.folder.resolve() / "node",
        address=network.address,
        root_certificate=root,
        key=key,
        bundle_digest=agreement.bundle_digest,
    )


def _key_file(network: OwnerNetwork, name: str, home: Path) -> Path:
    return home / (network.node_key or f"{name}.node")


def run_client(node: Node) -> None:
    """Run until stopped; after a loss of the network or the coordinator, connect again. Raises an AmalgramError if this
    machine is not fit for it.
    """
    check_internals()
    make_private_folder(node.state)
    with alone(node.state, "client"):
        for old in node.state.glob("*.log"):
            old.unlink()
        said = FollowedFile(node.state / "supernode.log")
        answered = FollowedFile(node.state / "superexec.log")
        while True:
            log.info("connecting to %s", node.address)
            with supernode(node) as parts:
                ended = _watch(parts, said, answered)
            log.warning("%s; trying again", ended)
            time.sleep(RETRY_SECONDS)


def _watch(parts: Mapping[str, Process], said: FollowedFile, answered: FollowedFile) -> str:
    """Pass on what the node says, and that the owner's app refused, until a part of it ends; then why."""
    reason, previous = "it said nothing", ""
    while True:
        ended = [name for name, process in parts.items() if process.poll() is not None]
        for line in said.new_lines():
            if line.startswith(MARK):
                log.info("%s", line.removeprefix(MARK))
            elif previous.startswith(NO_CONNECTION) or "error" in line.lower():
                reason = COLOURS.sub("", line).strip()
            previous = line
        for line in answered.new_lines():
            if REFUSED in line:
                log.warning("%s", COLOURS.sub("", line).strip())
        if ended:
            return f"{ended[0]} ended: {reason}"
        time.sleep(POLL_SECONDS)


@contextmanager
def supernode(node: Node) -> Iterator[Mapping[str, Process]]:
    """The pinned SuperNode, and the SuperExec that starts the owner's app for it."""
    environment = flower_environment(node.state / "flower")
    write_whole(node.state / "superexec.secret", secrets.token_bytes(32))
    secret = ["--superexec-auth-secret-file", str(node.state / "superexec.secret")]
    port = free_port()  # of this machine only; through it the SuperExec fetches messages
    pinned = [sys.executable, "-P", "-m", "deploy.launch.pinned_supernode", node.bundle_digest]
    pinned += ["--superlink", node.address, "--root-certificates", str(node.root_certificate)]
    pinned += ["--auth-supernode-private-key", str(node.key), "--host", "127.0.0.1", "--port", str(port)]
    pinned += ["--node-config", f"settings='{node.settings_file}'", "--isolation", "process"]
    superexec = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *secret]
    with started([*pinned, *secret], environment, node.state, node.state / "supernode.log") as process:
        bound = [sys.executable, "-P", "-m", "deploy.launch.bound_superexec", str(process.pid)]
        with started([*bound, *superexec], environment, node.state, node.state / "superexec.log") as executor:
            yield {"supernode": process, "superexec": executor}
