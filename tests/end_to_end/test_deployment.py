"""Servers, nodes and merges as processes of their own, over TLS, on this machine's addresses."""

import hashlib
import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.build import build_fab_from_disk
from flwr.proto.fleet_pb2 import UnregisterNodeFleetRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from common.agreement import load_agreement
from common.settings_file import write_settings
from deploy.commands.client import find_node, supernode
from deploy.launch.flower import APP_FOLDER, CONNECTION, flower_environment, flwr
from deploy.launch.internals import TOLD
from deploy.launch.processes import free_port, started
from deploy.network_keys import write_certificate, write_node_key
from server.output_folder import CHECKPOINT
from server.report.report import holds_result_of, read_report
from tests.support.network import (
    OWNERS,
    Command,
    Network,
    outside_address,
    proof,
    running,
    set_up,
    set_up_example,
    short_agreement,
    simulated_twin,
    wait_until,
)

SECRET = "a row that must never leave"


@pytest.fixture(scope="module")
def network(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("network") / "parties"
    shutil.copytree(reviews_folder, folder, ignore=shutil.ignore_patterns("output"))
    rows = folder / "data" / "hotel" / "train.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"text": SECRET, "label": "positive"}) + "\n")
    return set_up(folder, short_agreement(300))


@pytest.fixture(scope="module")
def server(network: Network) -> Iterator[Command]:
    with running("server", network.coordinator) as command:
        command.wait_for("listening on 0.0.0.0")
        yield command


def control(network: Network) -> dict[str, str]:
    """The environment in which Flower's command line reaches the server, as a coordinator can."""
    return flower_environment(network.folder / "server-state" / "flower")


def online(network: Network) -> set[str]:
    nodes = json.loads((network.folder / "server-state" / "nodes.json").read_text())
    listed = flwr(control(network), "supernode", "list", CONNECTION)["nodes"]
    assert {node["node-id"] for node in listed} == set(nodes.values())  # the agreement's owners and nobody else
    status = {node["node-id"]: node["status"] for node in listed}
    return {owner for owner, node in nodes.items() if status[node] == "online"}


def status_of(network: Network, host: str, path: str, method: str = "POST") -> int:
    trust = ssl.create_default_context(cafile=network.folder / "ca.pem")
    trust.check_hostname = False  # the certificate names localhost; here another address is asked on purpose
    request = urllib.request.Request(f"https://{host}:{network.port}{path}", data=b"", method=method)
    try:
        with urllib.request.urlopen(request, context=trust, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_from_another_address_the_server_shows_the_owners_interface_alone(network: Network, server: Command) -> None:
    outside = outside_address()
    if outside is None:
        pytest.skip("this machine has no address beside the loopback")
    closed = (
        "/v1/control/list-runs",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
    )
    for path in (
        "/v1/fleet/../control/list-runs",
        *closed,
        "/",
        "//v1/fleet/get-run",
        "/v1/fleet",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/health/",
    ):
        assert status_of(network, outside, path) == 403, path
        assert status_of(network, "127.0.0.1", path) != 403, path
    assert status_of(network, outside, "/health", "GET") == 200
    assert status_of(network, outside, "/v1/fleet/pull-messages") not in (200, 403)  # Flower's own answer: no key
    # A peer cannot say that it is another.
    trust = ssl.create_default_context(cafile=network.folder / "ca.pem")
    trust.check_hostname = False
    forged = urllib.request.Request(
        f"https://{outside}:{network.port}/v1/control/list-runs",
        data=b"",
        headers={"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1", "X-Real-IP": "127.0.0.1"},
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(forged, context=trust, timeout=20)


def test_only_the_agreement_s_keys_and_whoever_knows_the_server_s_certificate_connect(
    network: Network, server: Command, tmp_path: Path
) -> None:
    owner = network.owner("cinema")
    stranger = tmp_path / "stranger.node"
    write_node_key(stranger)
    other = owner.with_name("cinema-stranger.toml")
    other.write_text(f'{owner.read_text()}node_key = "{stranger}"\n')
    with running("client", other) as client:  # refused here already,
        assert client.exit_code(60) == 2
        assert "is not the node key that the agreement names for cinema" in client.said
    unknown = replace(find_node(owner), key=stranger, state=tmp_path)
    with supernode(unknown) as parts:  # and by the server
        assert parts["supernode"].wait(60) != 0
    assert "Failed to initialize the connection" in (tmp_path / "supernode.log").read_text()
    keyless = ["flower-supernode", "--superlink", f"127.0.0.1:{network.port}", "--host", "127.0.0.1"]
    keyless += ["--port", str(free_port()), "--root-certificates", str(network.folder / "ca.pem")]
    with started(keyless, flower_environment(tmp_path), tmp_path, tmp_path / "keyless.log") as process:
        assert process.wait(60) != 0
    assert "Failed to initialize the connection" in (tmp_path / "keyless.log").read_text()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_certificate(foreign, ["localhost"])
    other.write_text(f'{owner.read_text()}root_certificate = "{foreign / "ca.pem"}"\n')
    with running("client", other) as client:
        assert client.exit_code(60) == 1
        assert "did not issue the certificate at 127.0.0.1" in client.said
        assert "connected to the coordinator" not in client.said
    assert online(network) == set()


def test_no_node_changes_who_is_registered(network: Network, server: Command) -> None:
    """Not even its own entry: the server alone registers the keys of the agreement."""
    key = load_ssh_private_key(find_node(network.owner("cinema")).key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    nodes = json.loads((network.folder / "server-state" / "nodes.json").read_text())
    request = urllib.request.Request(
        f"https://localhost:{network.port}/v1/fleet/unregister-node",
        data=UnregisterNodeFleetRequest(node_id=int(nodes["cinema"])).SerializeToString(),
        headers={"content-type": PROTOBUF_MEDIA_TYPE, **proof(key)},
    )
    trust = ssl.create_default_context(cafile=network.folder / "ca.pem")
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, context=trust, timeout=20):
        pass
    assert b"must be unregistered via the CLI" in refused.value.read()
    online(network)  # lists all of them


def test_an_owner_that_has_not_consented_to_this_very_agreement_does_not_connect(network: Network) -> None:
    other = network.owner("phones").with_name("phones-other.toml")
    changed = network.agreement.model_copy(update={"title": "Another title"})
    write_settings(network.folder / "other-agreement.toml", changed)
    other.write_text(f'agreement = "other-agreement.toml"\n{network.owner("phones").read_text()}')
    with running("client", other) as client:
        assert client.exit_code(60) == 3
        assert "phones has not consented to this agreement\nhint: amalgram agree" in client.said


EVIL_CLIENT = """
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

Path({started!r}).touch()
app = ClientApp()

@app.train("step")
def step(message, context):
    return Message(RecordDict({{"loot": ConfigRecord({{"rows": Path({rows!r}).read_text()}})}}), reply_to=message)
"""
EVIL_SERVER = """
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    ids = [*grid.push_messages([Message(RecordDict(), dst_node_id=node, message_type="train.step") for node in nodes])]
    replies = []
    while not replies:
        time.sleep(0.2)
        replies = list(grid.pull_messages(ids))
    reply = replies[0]
    Path(context.run_config["coordinator"]).write_text(
        f"error {reply.error.code}" if reply.has_error() else reply.content["loot"]["rows"]
    )
"""


@pytest.mark.parametrize(
    "agreed", [pytest.param(False, id="refused"), pytest.param(True, id="had-it-been-agreed", marks=pytest.mark.slow)]
)
def test_a_bundle_that_reads_the_owner_s_rows_is_refused_and_would_have_got_them(
    network: Network, server: Command, tmp_path: Path, agreed: bool
) -> None:
    evil, loot, started_file = tmp_path / "evil", tmp_path / "loot", tmp_path / "started"
    rows = network.folder / "data" / "hotel" / "train.jsonl"
    for package in ("client", "server", "common"):
        (evil / package).mkdir(parents=True)
        (evil / package / "__init__.py").touch()
    for name in ("pyproject.toml", "server/report/model_card.jinja.md"):  # the second is named in the first
        (evil / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(APP_FOLDER / name, evil / name)
    (evil / "client" / "app.py").write_text(EVIL_CLIENT.format(started=str(started_file), rows=str(rows)))
    (evil / "server" / "app.py").write_text(EVIL_SERVER)
    node = find_node(network.owner("hotel"))
    digest = hashlib.sha256(build_fab_from_disk(evil)).hexdigest() if agreed else node.bundle_digest
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with supernode(replace(node, state=state, bundle_digest=digest)):
        answer = flwr(control(network), "run", str(evil), CONNECTION, "--run-config", f"coordinator='{loot}'")
        wait_until(lambda: loot.exists() and loot.read_text() != "", f"an answer to run {answer}", 90)
    said = (tmp_path / "state" / TOLD).read_text()
    if agreed:  # the attack works where nothing stops it
        assert SECRET in loot.read_text()
        return
    assert loot.read_text() == "error 7"
    assert f"REFUSED run {answer['run-id']} of the coordinator" in said
    assert not started_file.exists()
    assert not (tmp_path / "state" / "flower" / "apps").exists()
    received = [path for path in (network.folder / "server-state").rglob("*") if path.is_file()]
    assert received
    assert not any(SECRET.encode() in path.read_bytes() for path in received)


def test_a_second_server_or_one_on_a_taken_port_does_not_start_and_does_not_disturb(
    network: Network, server: Command
) -> None:
    with running("server", network.coordinator) as second:
        assert second.exit_code(60) == 2
        assert "another `amalgram server` is already running here" in second.said
    other = network.coordinator.with_name("coordinator-other.toml")
    other.write_text(network.coordinator.read_text() + 'state = "server-other"\n')
    with running("server", other) as second:
        assert second.exit_code(60) == 2
        assert f"port {network.port} of this machine is taken" in second.said
    assert online(network) == set()


def test_health_tells_whether_the_server_is_there_and_is_the_right_one(network: Network, server: Command) -> None:
    with running("health", network.coordinator) as health:
        assert health.exit_code(60) == 0, health.said
        assert f"healthy: https://127.0.0.1:{network.port}/health" in health.said
    other = network.coordinator.with_name("coordinator-health.toml")
    other.write_text(network.coordinator.read_text().replace(f":{network.port}", f":{free_port()}"))
    with running("health", other) as health:
        assert health.exit_code(60) == 1
        assert "is `amalgram server` running?" in health.said
    foreign = network.folder / "foreign"
    foreign.mkdir()
    write_certificate(foreign, ["localhost"])
    other.write_text(f'{network.coordinator.read_text()}root_certificate = "foreign/ca.pem"\n')
    with running("health", other) as health:
        assert health.exit_code(60) == 1
        assert "did not issue the certificate at 127.0.0.1" in health.said


def test_a_merge_without_a_server_says_so(network: Network) -> None:
    other = network.coordinator.with_name("coordinator-alone.toml")
    text = network.coordinator.read_text().replace('"output"', '"output-alone"')
    text = text.replace(f":{network.port}", f":{free_port()}")
    other.write_text(f'{text}state = "server-alone"\n')
    with running("merge", other) as merge:
        assert merge.exit_code(60) == 1
        assert "server-alone/nodes.json: is missing\nhint: start `amalgram server` first" in merge.said
    (network.folder / "server-alone").mkdir()
    (network.folder / "server-alone" / "nodes.json").write_text("{}")
    with running("merge", other) as merge:
        assert merge.exit_code(60) == 1
        assert "is `amalgram server` running?" in merge.said


def test_a_merge_that_is_over_answers_at_once_and_asks_nobody(network: Network, example_run: Path) -> None:
    other = network.coordinator.with_name("coordinator-over.toml")
    other.write_text(network.coordinator.read_text().replace('"output"', '"output-over"'))
    output = network.folder / "output-over"
    output.mkdir()
    (output / ".amalgram").touch()
    report = json.loads((example_run / "report.json").read_text())
    report["digests"]["agreement"] = load_agreement(network.folder / "agreement.toml").digest()
    (output / "report.json").write_text(json.dumps(report))
    with running("merge", other) as merge:
        assert merge.exit_code(60) == 0
        assert "this agreement is merged already" in merge.said
    assert not holds_result_of(output, "0" * 64)
    (output / CHECKPOINT).mkdir()  # with one, owners may still have to sign
    assert not holds_result_of(output, report["digests"]["agreement"])


@pytest.mark.slow
def test_owners_come_back_after_the_server_was_killed_and_started_again(reviews_folder: Path, tmp_path: Path) -> None:
    network = set_up_example(reviews_folder, tmp_path / "parties", short_agreement(300))
    with ExitStack() as stack:
        first = stack.enter_context(running("server", network.coordinator))
        first.wait_for("listening on")
        client = stack.enter_context(running("client", network.owner("phones")))
        client.wait_for("connected to the coordinator")
        family = first.family()
        first.process.kill()
        assert psutil.wait_procs(family, 30)[1] == []
        second = stack.enter_context(running("server", network.coordinator))
        second.wait_for("listening on")
        wait_until(lambda: client.said.count("connected to the coordinator") == 2, "phones to come back", 120)
        wait_until(lambda: online(network) == {"phones"}, "phones to be online")


@pytest.mark.slow
def test_three_owners_merge_over_tls_to_the_very_model_of_a_simulation(
    network: Network, server: Command, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        clients = {name: stack.enter_context(running("client", network.owner(name))) for name in OWNERS}
        for client in clients.values():
            client.wait_for("connected to the coordinator")
        # An owner that is killed takes everything with it, and comes back as if nothing had been.
        family = clients["hotel"].family()
        clients["hotel"].process.kill()
        assert psutil.wait_procs(family, 30)[1] == []
        merge = stack.enter_context(running("merge", network.coordinator))
        merge.wait_for("waiting for hotel", 90)
        stack.enter_context(running("client", network.owner("hotel")))
        assert merge.exit_code(900) == 0, merge.said
        for name in ("cinema", "phones"):
            clients[name].wait_for(f"a merge is over; the receipt is {network.folder}/state-{name}/receipts/")
    for shown in (
        "all owners are connected",
        "sum of contributions",
        "result",
        "masked sum: the coordinator saw totals",
    ):
        assert shown in merge.said
    report = read_report(network.folder / "output")
    assert (report.owners, report.dropped_out) == (OWNERS, {})
    simulated = simulated_twin(network, tmp_path / "simulated")
    assert report.digests.model == simulated.digests.model
    assert report.evaluation == simulated.evaluation
