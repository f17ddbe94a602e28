"""`amalgram client`: an owner's node. It runs the bundle that the owner consented to, and reconnects after any failure.

It keeps Flower's home, a secret and its logs in `node/` of the owner's state folder (0700).
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
from client.verification import check_no_evidence, wrong_model
from common.errors import ConsentError, EngineError, SettingsError
from common.private_file import make_private_folder, write_whole
from deploy.launch.flower import flower_environment
from deploy.launch.internals import TOLD, check_internals
from deploy.launch.processes import POLL_SECONDS, FollowedFile, NewFiles, Process, alone, free_port, started
from deploy.network_keys import check_node_key, read_certificate
from deploy.reach import check_reachable, wait_until_reachable
from deploy.terminal import answer

RETRY_SECONDS = 5.0
LAST_ANSWER_SECONDS = 10.0  # for the refusal of a wrong model to leave, before the node stops
NO_CONNECTION = "Failed to initialize the connection"  # from the SuperNode's log; its next line has the reason
# From the owner's app, which logs no reason, because that may quote a row. The rest of a line may be somebody else's.
REFUSED = re.compile(r"owner [\w.-]+ refused; its error\.txt says why|refused: this node's settings cannot be used")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
log = logging.getLogger("amalgram.client")


@dataclass(frozen=True)
class Node:
    """One owner's node, checked: everything that its processes need."""

    settings_file: Path
    state: Path
    address: str
    root_certificate: Path
    key: Path
    bundle_digest: str
    threads: int | None
    evidence: Path  # is there once a model was wrong


def run_client(settings_file: Path) -> None:
    """Check an owner's node, print where it connects, and run it until stopped.

    A server that is away at the start is waited for, though not for ever: a person may be there to correct what is
    wrong. Raises EngineError if it stays away, or is the wrong one; and WrongModel once the coordinator has sent a
    model that is not the merge, after which nothing is answered.
    """
    node = find_node(settings_file)
    wait_until_reachable(node.address, node.root_certificate)
    answer({"address": node.address, "state": str(node.state), "bundle_digest": node.bundle_digest})
    keep_connected(node)


def find_node(settings_file: Path) -> Node:
    """Check an owner's settings. Raises ConsentError unless the owner consented to the agreement that they name, and
    SettingsError unless its keys are the agreed ones, and WrongModel if a model that was sent under it was wrong.
    """
    owner = Owner(settings_file)
    network, key, root = owner_network(owner, settings_file)
    check_no_evidence(owner)
    agreement = owner.agreement
    if agreement.digest() not in owner.state.consents():  # check: consent-comes-before-connecting
        raise ConsentError(f"{owner.name} has not consented to this agreement", hint=f"amalgram agree {settings_file}")
    return Node(
        settings_file=settings_file.resolve(),
        state=owner.state.folder.resolve() / "node",
        address=network.address,
        root_certificate=root,
        key=key,
        bundle_digest=agreement.bundle_digest,
        threads=owner.settings.threads,
        evidence=owner.state.evidence_path(agreement.digest()).resolve(),
    )


def owner_network(owner: Owner, settings_file: Path) -> tuple[OwnerNetwork, Path, Path]:
    """How an owner's node connects: its settings, its node key and the root certificate, checked.

    Raises SettingsError unless the key is the agreed one and the certificate is valid now.
    """
    network = owner.settings.network
    if network is None:
        raise SettingsError(f"{settings_file}: has no [network] table", hint='it needs at least address = "HOST:PORT"')
    key, root = _key_file(network, owner.name, owner.home), owner.home / network.root_certificate
    check_node_key(key, owner.name, owner.agreement)
    read_certificate(root)
    return network, key, root


def _key_file(network: OwnerNetwork, name: str, home: Path) -> Path:
    return home / (network.node_key or f"{name}.node")


def keep_connected(node: Node) -> None:
    """Run until stopped, and connect again whenever the network or the coordinator fails. Raises an AmalgramError if
    this machine cannot run the node, and WrongModel if a model is wrong.
    """
    check_internals()
    make_private_folder(node.state)
    with alone(node.state, "client"):
        for old in node.state.glob("*.log"):
            old.unlink()
        said, told, answered = (FollowedFile(node.state / name) for name in ("supernode.log", TOLD, "superexec.log"))
        receipts = NewFiles(node.state.parent / "receipts")
        while True:
            log.info("connecting to %s", node.address)
            with supernode(node) as parts:
                ended = _watch(node.evidence, parts, said, told, answered, receipts)
            log.warning("%s; trying again", ended)
            time.sleep(RETRY_SECONDS)
            _wait_until_reachable(node)


def _wait_until_reachable(node: Node) -> None:
    """Wait for a server that is away, and say why it cannot be reached whenever that changes."""
    told = ""
    while True:
        try:
            return check_reachable(node.address, node.root_certificate)
        except EngineError as error:
            if error.message != told:
                log.warning("%s; trying again", error.message)
            told = error.message
        time.sleep(RETRY_SECONDS)


def _watch(
    evidence: Path,
    parts: Mapping[str, Process],
    said: FollowedFile,
    told: FollowedFile,
    answered: FollowedFile,
    receipts: NewFiles,
) -> str:
    """Log what the node reports, each refusal of the owner's app, and each receipt. Returns which part ended, and why;
    raises WrongModel if a model is wrong.

    `said` and `answered` are Flower's logs, where a line may be part of an error that the coordinator wrote.
    """
    reason, previous = "it logged nothing", ""
    while True:
        ended = [name for name, process in parts.items() if process.poll() is not None]
        for line in told.new_lines():
            log.info("%s", line)
        for line in said.new_lines():
            if previous.startswith(NO_CONNECTION) or "error" in line.lower():
                reason = COLOURS.sub("", line).strip()
            previous = line
        for line in answered.new_lines():
            if refusal := REFUSED.search(line):  # check: only-our-words-are-repeated
                log.warning("%s", refusal[0])
        for path in receipts.since_last_time():
            log.info("a merge is over; the receipt is %s", path)
        if evidence.is_file():  # check: client-ends-after-a-wrong-model
            time.sleep(LAST_ANSWER_SECONDS)
            raise wrong_model(evidence)
        if ended:
            return f"{ended[0]} ended: {reason}"
        time.sleep(POLL_SECONDS)


@contextmanager
def supernode(node: Node) -> Iterator[Mapping[str, Process]]:
    """The pinned SuperNode, and the SuperExec that starts the owner's app for it."""
    environment = flower_environment(node.state / "flower", node.threads)
    write_whole(node.state / "superexec.secret", secrets.token_bytes(32))
    secret = ["--superexec-auth-secret-file", str(node.state / "superexec.secret")]
    port = free_port()  # on this machine only: the SuperExec fetches messages from it
    pinned = [sys.executable, "-P", "-m", "deploy.launch.pinned_supernode", node.bundle_digest]
    pinned += ["--superlink", node.address, "--root-certificates", str(node.root_certificate)]
    pinned += ["--auth-supernode-private-key", str(node.key), "--host", "127.0.0.1", "--port", str(port)]
    pinned += ["--node-config", f"settings='{node.settings_file}'", "--isolation", "process"]
    superexec = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *secret]
    with started([*pinned, *secret], environment, node.state, node.state / "supernode.log") as process:
        bound = [sys.executable, "-P", "-m", "deploy.launch.bound_superexec", str(process.pid)]
        with started([*bound, *superexec], environment, node.state, node.state / "superexec.log") as executor:
            yield {"supernode": process, "superexec": executor}
