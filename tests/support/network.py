"""A coordinator and three owners set up as for machines of their own, and their commands as processes of the tests."""

import shutil
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from client.owner import Owner
from common.agreement import COORDINATOR, Agreement, AgreementDraft
from common.identity import Identity, write_identity
from common.settings_file import load_settings, write_settings
from deploy.commands.agree import give_consent
from deploy.complete import complete_agreement
from deploy.launch.processes import free_port
from deploy.network_keys import write_certificate, write_node_key
from deploy.simulation.simulate import simulate
from server.report.report import Report
from tests.support.commands import fork

OWNERS = ("hotel", "cinema", "phones")


@dataclass(frozen=True)
class Network:
    """All parties' files, in one folder; nothing is running."""

    folder: Path
    port: int
    agreement: Agreement

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator.toml"

    def owner(self, name: str) -> Path:
        return self.folder / f"{name}.toml"


def set_up(folder: Path, short: str, owners: Sequence[str] = OWNERS) -> Network:
    """`folder` holds the example; `short` replaces its agreement.toml. Listens on every address of this machine."""
    port = free_port()
    (folder / "agreement.toml").unlink(missing_ok=True)
    (folder / "short.toml").write_text(short)
    keys, node_keys = {}, {}
    for number, name in enumerate((*owners, COORDINATOR), 1):
        identity = Identity(name=name, seed=bytes([number]) * 32)
        keys[name] = identity.public_key
        if name != COORDINATOR:
            node_keys[name] = write_node_key(folder / f"{name}.node")
        write_identity(folder / f"{name}.key", identity, node_keys.get(name))
    write_certificate(folder, ["localhost"])
    draft = load_settings(folder / "short.toml", AgreementDraft)
    agreement = complete_agreement(draft, folder / "base", keys, node_keys)
    write_settings(folder / "agreement.toml", agreement)
    network = Network(folder, port, agreement)
    network.coordinator.write_text(
        f'agreement = "agreement.toml"\noutput = "output"\n[network]\nlisten = "0.0.0.0:{port}"\n'
    )
    for name in owners:
        settings = network.owner(name).read_text()
        table = f'\n[network]\naddress = "127.0.0.1:{port}"\n'
        network.owner(name).write_text(f'state = "state-{name}"\n{settings}{table}')
        give_consent(Owner(network.owner(name)))
    return network


def short_agreement(reply_timeout_seconds: int) -> str:
    """As little of a merge as can be, so that a test waits for messages and not for computing."""
    return f"""
title = "Reviews of three shops"
base = "base"
method = "average"
[task]
max_tokens = 32
[summation]
reply_timeout_seconds = {reply_timeout_seconds}
""" + "".join(f'[[owners]]\nname = "{name}"\n' for name in OWNERS)


def set_up_example(example: Path, folder: Path, short: str) -> Network:
    """The example's rows and models, copied to `folder`, with another agreement."""
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("output"))
    return set_up(folder, short)


def simulated_twin(network: Network, folder: Path) -> Report:
    """The report of a simulation with the same files, seeds and agreement."""
    shutil.copytree(network.folder, folder, ignore=shutil.ignore_patterns("output", "state-*", "*state", "*.toml"))
    shutil.copy(network.folder / "short.toml", folder / "agreement.toml")
    for name in OWNERS:
        shutil.copy(network.owner(name), folder)
    return simulate(folder, folder / "output", with_references=False)


@dataclass
class Command:
    """A command of ours that is running, and what it has said."""

    process: BaseProcess
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        wait_until(lambda: text in self.said or not self.process.is_alive(), f"{text!r} in:\n{self.said}", seconds)
        assert text in self.said, self.said

    def exit_code(self, seconds: float) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"is still running:\n{self.said}"
        return self.process.exitcode

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]


@contextmanager
def running(*arguments: str | Path, **environment: str) -> Iterator[Command]:
    """`amalgram ARGUMENTS`, with this in its environment, ended with SIGTERM when the block is left; then nothing of it
    may be left running.
    """
    log = Path(arguments[-1]).with_suffix(f".{arguments[0]}.{time.monotonic_ns()}.log")
    with log.open("wb") as output:
        process = fork(arguments, Path.cwd(), {"COLUMNS": "300"} | environment, output.fileno(), output.fileno())
        started = Command(process, log)
        try:
            yield started
        finally:
            family = started.family() if process.is_alive() else []
            process.terminate()
            process.join(60)
            left = psutil.wait_procs(family, 10)[1]
            for each in left:
                each.kill()
    assert left == []


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def outside_address() -> str | None:
    """An address of this machine that is none of the loopback, if it has one."""
    addresses = [each for found in psutil.net_if_addrs().values() for each in found if each.family == socket.AF_INET]
    return next((each.address for each in addresses if not each.address.startswith("127.")), None)


def proof(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers by which a node proves its key, as Flower's client makes them."""
    timestamp = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
    }
