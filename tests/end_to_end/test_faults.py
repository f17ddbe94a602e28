"""A merge between processes that meets faults: kill -9 of every part, an owner that is too slow, tampered lines.

The same commands resume it, or end with an error that says what to do.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from deploy.network_keys import write_certificate
from server.report.report import read_report
from tests.support.network import (
    OWNERS,
    Command,
    Network,
    running,
    set_up_example,
    short_agreement,
    simulated_twin,
    wait_until,
)
from tests.support.programs import required_program
from tests.support.proxy import Proxy

pytestmark = pytest.mark.slow
CONTRIBUTION = 0  # the position of its round


def offered(network: Network, owner: str) -> dict[int, str]:
    """Position of a round -> session, for all that an owner has begun to send under this agreement."""
    path = network.folder / f"{owner}.ledger"
    pages = json.loads(path.read_text())["pages"] if path.is_file() else {}
    offers = pages.get(network.agreement.digest(), {}).get("offers", ())
    return {each["position"]: each["session"] for each in offers}


def saved_sums(network: Network) -> list[int]:
    """The positions of the rounds whose totals the coordinator has saved."""
    path = network.folder / "output" / "checkpoint" / "run.json"
    return [each["position"] for each in json.loads(path.read_text())["sums"]] if path.is_file() else []


def opening(network: Network) -> bool:
    return (network.folder / "output" / "checkpoint" / "opening.bin").is_file()


def kill_all(family: list[psutil.Process]) -> None:
    for each in family:
        each.kill()
    psutil.wait_procs(family, 30)


def part_of(command: Command, program: str) -> psutil.Process:
    """The process of a running command that runs `program`."""
    return next(each for each in command.family() if runs(each, program))


def runs(process: psutil.Process, program: str) -> bool:
    """Whether it was started as `program`, or is a fork that took its name."""
    return any(program in word for word in (process.name(), *process.cmdline()))


def connect_through(network: Network, owner: str, proxy: Proxy) -> None:
    path = network.owner(owner)
    path.write_text(path.read_text().replace(f":{network.port}", f":{proxy.port}"))


def last_line(command: Command) -> str:
    return command.said.strip().splitlines()[-1]


def no_result(network: Network) -> bool:
    return not any((network.folder / "output" / name).exists() for name in ("model", "report.json"))


def test_a_merge_whose_every_part_is_killed_in_turn_ends_in_the_very_model_of_a_simulation(
    reviews_folder: Path, tmp_path: Path
) -> None:
    network = set_up_example(reviews_folder, tmp_path / "parties", short_agreement(240))
    with ExitStack() as stack:
        server = stack.enter_context(running("server", network.coordinator))
        server.wait_for("listening on")
        clients = {name: stack.enter_context(running("client", network.owner(name))) for name in OWNERS}

        # An owner, with everything it runs, after its masked vector has begun to leave.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: CONTRIBUTION in offered(network, "hotel"), "hotel's upload", 1000)
        wait_until(lambda: not (network.folder / "state-hotel" / "node" / "unanswered").exists(), "its arrival", 100)
        kill_all(clients["hotel"].family())
        stack.enter_context(running("client", network.owner("hotel")))
        assert merge.exit_code(400) == 4, merge.said
        assert last_line(merge) == "hint: bring the missing owners back, then run the same command again to resume"
        assert no_result(network)

        # The coordinator's app, when the owners are asked to open the sum: they do so for this session or for none.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: opening(network), "the opening", 1000)
        given = {name: offered(network, name)[CONTRIBUTION] for name in OWNERS}
        os.kill(part_of(server, "flwr-serverapp").pid, signal.SIGKILL)
        assert merge.exit_code(400) == 1, merge.said
        assert "run the same command again" in last_line(merge)
        assert no_result(network)

        # The whole server, when the total is in and a candidate goes out.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: saved_sums(network) == [CONTRIBUTION], "the total", 1000)
        family = server.family()
        server.process.kill()
        assert psutil.wait_procs(family, 30)[1] == []  # nothing of it continues by itself
        assert merge.exit_code(400) == 1, merge.said
        assert "check that `amalgram server` runs, and run the same command again" in last_line(merge)
        assert no_result(network)

        stack.enter_context(running("server", network.coordinator)).wait_for("listening on")
        merge = stack.enter_context(running("merge", network.coordinator))
        assert merge.exit_code(1500) == 0, merge.said
    report = read_report(network.folder / "output")
    assert (report.owners, report.dropped_out) == (OWNERS, {})
    assert {name: offered(network, name)[CONTRIBUTION] for name in OWNERS} == given
    assert len({offered(network, name)[max(offered(network, name))] for name in OWNERS}) == 1  # the test metrics
    assert not (network.folder / "output" / "checkpoint").exists()
    simulated = simulated_twin(network, tmp_path / "simulated")
    assert report.digests.model == simulated.digests.model
    assert report.evaluation == simulated.evaluation


def test_owners_that_are_too_slow_or_whose_line_is_tampered_with_drop_out_and_may_come_back(
    reviews_folder: Path, tmp_path: Path
) -> None:
    short = short_agreement(120).replace('base = "base"', 'base = "base"\nmin_owners = 2')
    short = short.replace("[summation]", '[summation]\nkind = "plain"')
    network = set_up_example(reviews_folder, tmp_path / "parties", short)
    with ExitStack() as stack:
        server = stack.enter_context(running("server", network.coordinator))
        server.wait_for("listening on")
        proxy = stack.enter_context(Proxy(network.port))
        connect_through(network, "cinema", proxy)
        clients = {name: stack.enter_context(running("client", network.owner(name))) for name in OWNERS}
        for client in clients.values():
            client.wait_for("connected to the coordinator", 120)
        merge = stack.enter_context(running("merge", network.coordinator))
        merge.wait_for("sum of contributions, 3 owners", 400)
        # phones is alive but does not finish.
        slow = [each for each in clients["phones"].family() if is_slowed(each)]
        for each in slow:
            each.suspend()
        merge.wait_for("owner phones dropped out at sum of contributions: no answer", 300)
        wait_until(lambda: saved_sums(network) == [CONTRIBUTION], "the total of the others", 300)
        # Then whatever cinema sends is falsified, until its node has noticed.
        proxy.tampering = True
        wait_until(lambda: proxy.tampered > 0, "something to tamper with", 300)
        clients["cinema"].wait_for("trying again", 200)
        proxy.tampering = False
        assert merge.exit_code(600) == 4, merge.said
        assert "owner cinema dropped out" in merge.said
        assert "again" in last_line(merge)
        assert no_result(network)
        for each in slow:
            each.resume()
        merge = stack.enter_context(running("merge", network.coordinator))
        assert merge.exit_code(900) == 0, merge.said
    report = read_report(network.folder / "output")
    assert report.owners == ("hotel", "cinema")  # whose numbers are in the model
    assert report.dropped_out == {}
    assert [step.title for step in report.steps].count("sum of contributions") == 1


def is_slowed(process: psutil.Process) -> bool:
    """Whether it runs an owner's app, or starts one. The node itself keeps telling the server that it is there."""
    return runs(process, "bound_superexec") or runs(process, "flwr-clientapp")


def test_whoever_sits_on_the_line_with_a_certificate_of_its_own_reads_nothing(
    reviews_folder: Path, tmp_path: Path
) -> None:
    network = set_up_example(reviews_folder, tmp_path / "parties", short_agreement(240))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_certificate(foreign, ["localhost"])
    with ExitStack() as stack:
        stack.enter_context(running("server", network.coordinator)).wait_for("listening on")
        proxy = stack.enter_context(Proxy(network.port, foreign / "server.pem", foreign / "server.key"))
        connect_through(network, "cinema", proxy)
        client = stack.enter_context(running("client", network.owner("cinema")))
        assert client.exit_code(120) == 1
        assert "did not issue the certificate at 127.0.0.1" in client.said
        assert "connected to the coordinator" not in client.said
        assert proxy.connections > 0
        assert proxy.read == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace can be made by root alone")
def test_a_machine_of_another_network_reaches_the_owners_interface_and_the_health_alone(
    reviews_folder: Path, tmp_path: Path
) -> None:
    network = set_up_example(reviews_folder, tmp_path / "parties", short_agreement(240))
    required_program("ip", package="iproute2")
    with ExitStack() as stack:
        stack.enter_context(running("server", network.coordinator)).wait_for("listening on")
        outside = stack.enter_context(other_machine())
        answers = {path: outside(network, path) for path in ("/health", *CLOSED, "/v1/fleet/pull-messages")}
        with running("health", network.coordinator) as health:
            assert health.exit_code(60) == 0, health.said
            assert "healthy: https://127.0.0.1" in health.said
    assert {path: answers[path] for path in CLOSED} == dict.fromkeys(CLOSED, "403")
    assert answers["/health"] == "200"
    assert answers["/v1/fleet/pull-messages"] not in ("200", "403", "")  # Flower's own answer: no key
    with running("health", network.coordinator) as health:
        assert health.exit_code(60) == 1
        assert "is `amalgram server` running?" in health.said


CLOSED = ("/v1/control/list-runs", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/openapi.json")
ASK = """
import ssl, sys, urllib.error, urllib.request
trust = ssl.create_default_context(cafile=sys.argv[2])
trust.check_hostname = False  # the certificate names localhost
request = urllib.request.Request(sys.argv[1], data=None if sys.argv[1].endswith("/health") else b"")
try:
    print(urllib.request.urlopen(request, context=trust, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@contextmanager
def other_machine() -> Iterator[Callable[[Network, str], str]]:
    """A network namespace with a line to this one: asks the server for a path from there."""
    name, here, there = (f"am{kind}{os.getpid()}" for kind in "nht")
    subnet = "10.213.77"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("address", "add", f"{subnet}.1/24", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "address", "add", f"{subnet}.2/24", "dev", there)
        ip("-n", name, "link", "set", there, "up")
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        pytest.skip(f"no network namespace here: {error.stderr.decode()}")

    def ask(network: Network, path: str) -> str:
        command = ["ip", "netns", "exec", name, sys.executable, "-c", ASK]
        command += [f"https://{subnet}.1:{network.port}{path}", str(network.folder / "ca.pem")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        yield ask
    finally:
        ip("netns", "delete", name)  # and both ends of the line with it
