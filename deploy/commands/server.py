"""`amalgram server`: a guarded SuperLink that admits one agreement's owners, and a SuperExec for the coordinator's app.

It keeps its files in `network.state` (0700) and makes them anew at every start: Flower's home, the secret that a
SuperExec must know, the owners' node ids, and logs.
"""

import json
import logging
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.agreement import Agreement, load_agreement
from common.errors import EngineError, SettingsError
from common.private_file import make_private_folder, write_whole
from common.settings_file import load_settings
from common.text import some_of
from deploy.launch.flower import CONNECTION, check_bundle, flower_environment, flwr, write_connection
from deploy.launch.internals import check_internals
from deploy.launch.processes import POLL_SECONDS, Process, alone, last_line, listens, started, wait_for_port
from deploy.network_keys import check_server_files
from deploy.terminal import answer
from server.settings import CoordinatorSettings, ServerNetwork

log = logging.getLogger("amalgram.server")


@dataclass(frozen=True)
class Place:
    """Where a coordinator's server keeps its files, for `amalgram server` and `amalgram merge` alike."""

    settings: CoordinatorSettings
    network: ServerNetwork
    agreement: Agreement
    home: Path  # the folder of the settings file

    @property
    def state(self) -> Path:
        return self.home / self.network.state

    @property
    def flower_home(self) -> Path:
        return self.state / "flower"

    @property
    def nodes_file(self) -> Path:
        """JSON: owner -> Flower's id of its node."""
        return self.state / "nodes.json"

    @property
    def output(self) -> Path:
        return self.home / self.settings.output

    @property
    def environment(self) -> dict[str, str]:
        return flower_environment(self.flower_home, self.settings.threads)

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.network.listen.rpartition(":")
        return host.strip("[]"), int(port)


def run_server(settings_file: Path) -> None:
    """Check the coordinator's settings, print where the server listens, and serve until stopped."""
    place = find_place(settings_file)
    host, port = place.host_and_port
    answer({"host": host, "port": port, "owners": place.agreement.owner_names, "state": str(place.state)})
    serve(place)


def find_place(settings_file: Path) -> Place:
    """The coordinator's checked settings. Raises SettingsError if they or the agreement lack what a network needs, and
    ConsentError if this program's bundle is not the agreed one.
    """
    settings = load_settings(settings_file, CoordinatorSettings)
    if settings.network is None:
        raise SettingsError(
            f"{settings_file}: has no [network] table", hint='it needs at least listen = "0.0.0.0:PORT"'
        )
    home = settings_file.resolve().parent
    agreement = load_agreement(home / settings.agreement)
    for owner in agreement.owners:
        if owner.node_key is None:
            raise SettingsError(
                f"{home / settings.agreement}: {owner.name} has no node_key",
                hint="draft the agreement again, with .pub files that `amalgram keys new` made",
            )
    check_bundle(agreement)
    return Place(settings, settings.network, agreement, home)


def serve(place: Place) -> None:
    """Serve until stopped. Raises an AmalgramError if the server cannot start or one of its processes ends."""
    check_internals()
    files = (place.network.certificate, place.network.key, place.network.root_certificate)
    certificate, key, root = (place.home / path for path in files)
    check_server_files(certificate, key, root)
    host, port = place.host_and_port
    for folder in (place.state, place.flower_home):
        make_private_folder(folder)
    with alone(place.state, "server"), _superlink(place, certificate, key, root) as parts:
        _register_owners(place)
        log.info("listening on %s port %d for %s", host, port, some_of(place.agreement.owner_names))
        while True:
            for name, process in parts.items():
                if process.poll() is not None:
                    log_file = place.state / f"{name}.log"
                    raise EngineError(f"{name} ended: {last_line(log_file)}", hint=f"see {log_file}")
            time.sleep(POLL_SECONDS)


def _renew_state(place: Place, root: Path) -> None:
    for old in (place.nodes_file, *place.state.glob("*.log")):
        old.unlink(missing_ok=True)
    write_whole(place.state / "superexec.secret", secrets.token_bytes(32))
    write_connection(place.flower_home, place.host_and_port[1], root)


@contextmanager
def _superlink(place: Place, certificate: Path, key: Path, root: Path) -> Iterator[Mapping[str, Process]]:
    """The guarded SuperLink and the SuperExec that starts the coordinator's app for it."""
    host, port = place.host_and_port
    if listens(port):
        raise SettingsError(
            f"listen: port {port} of this machine is taken",
            hint="end the program that listens there, or choose another port",
        )
    _renew_state(place, root)
    secret = ["--superexec-auth-secret-file", str(place.state / "superexec.secret")]
    superlink = [sys.executable, "-P", "-m", "deploy.launch.guarded_superlink", "--host", host, "--port", str(port)]
    superlink += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(root)]
    superlink += ["--enable-supernode-auth"]  # check: nodes-register-nobody
    superlink += ["--disable-runtime-dependency-installation", "--isolation", "process"]
    superexec = ["--runtime-api-address", f"127.0.0.1:{port}", "--root-certificates", str(root), *secret]
    logs = {name: place.state / f"{name}.log" for name in ("superlink", "superexec")}
    with started([*superlink, *secret], place.environment, place.state, logs["superlink"]) as link:
        wait_for_port(port, link, logs["superlink"])
        bound = [sys.executable, "-P", "-m", "deploy.launch.bound_superexec", str(link.pid)]
        with started([*bound, *superexec], place.environment, place.state, logs["superexec"]) as executor:
            yield {"superlink": link, "superexec": executor}


def _register_owners(place: Place) -> None:
    """Admit the nodes of the agreement's owners. The SuperLink starts without any, so it admits nobody else."""
    nodes = {}
    for owner in place.agreement.owners:
        public = place.state / "node.pub"
        public.write_text(f"{owner.node_key}\n")
        answer = flwr(place.environment, "supernode", "register", str(public), CONNECTION, "--name", owner.name)
        if not answer.get("node-id"):
            raise EngineError(f"Flower did not register {owner.name}: {answer.get('error-message', answer)}")
        nodes[owner.name] = str(answer["node-id"])
        public.unlink()
    write_whole(place.nodes_file, json.dumps(nodes).encode())
