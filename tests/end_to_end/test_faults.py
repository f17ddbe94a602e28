"""A merge between processes of their own that is hurt on the way: kill -9 of every part, an owner that is too slow,
lines that are tampered with. The same commands go on, or end with one line that says what to do.
"""

import json
import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.simulate import simulate
from server.report import read_report
from tests.network import OWNERS, Command, Network, running, set_up, wait_until

pytestmark = pytest.mark.slow
SHORT = """
title = "Reviews of three shops"
base = "base"
method = "average"
[task]
max_tokens = 32
[summation]
reply_timeout_seconds = 120
[[owners]]
name = "hotel"
[[owners]]
name = "cinema"
[[owners]]
name = "phones"
"""


def offered(network: Network, owner: str) -> dict[str, str]:
    """Statistic -> session, of all that an owner has begun to send under this agreement."""
    path = network.folder / f"state-{owner}" / "ledger.json"
    pages = json.loads(path.read_text()) if path.is_file() else {}
    given: dict[str, str] = pages.get(network.agreement.digest(), {}).get("offered", {})
    return given


def kept_sums(network: Network) -> list[str]:
    path = network.folder / "output" / "checkpoint" / "run.json"
    return [each["statistic"] for each in json.loads(path.read_text())["sums"]] if path.is_file() else []


def kill_all(family: list[psutil.Process]) -> None:
    for each in family:
        each.kill()
    psutil.wait_procs(family, 30)


def part_of(command: Command, program: str) -> psutil.Process:
    """The process of a running command that runs `program`."""
    return next(each for each in command.family() if any(program in word for word in each.cmdline()))


def simulated_twin(network: Network, folder: Path) -> dict[str, Any]:
    """The report of a simulation with the same files, seeds and agreement."""
    shutil.copytree(network.folder, folder, ignore=shutil.ignore_patterns("output", "state-*", "*state", "*.toml"))
    (folder / "agreement.toml").write_text((network.folder / "short.toml").read_text())
    for name in OWNERS:
        shutil.copy(network.owner(name), folder)
    return simulate(folder, folder / "output", with_references=False)


def last_line(command: Command) -> str:
    return command.said.strip().splitlines()[-1]


def no_result(network: Network) -> bool:
    return not any((network.folder / "output" / name).exists() for name in ("model", "report.json"))


def test_a_merge_whose_every_part_is_killed_in_turn_goes_on_to_the_very_model_of_a_simulation(
    reviews_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "parties"
    shutil.copytree(reviews_folder, folder, ignore=shutil.ignore_patterns("output"))
    network = set_up(folder, SHORT)
    with ExitStack() as stack:
        server = stack.enter_context(running("server", network.coordinator))
        server.wait_for("listening on")
        clients = {name: stack.enter_context(running("client", network.owner(name))) for name in OWNERS}

        # An owner, with everything it runs, after its masked vector has begun to leave.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: "contribution" in offered(network, "hotel"), "hotel's upload", 300)
        kill_all(clients["hotel"].family())
        stack.enter_context(running("client", network.owner("hotel")))
        assert merge.exit_code(90) == 4, merge.said
        assert "run again" in last_line(merge)
        assert no_result(network)

        # The coordinator's app, when the total is in.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: kept_sums(network) == ["contribution"], "the total", 400)
        given = {name: offered(network, name)["contribution"] for name in OWNERS}
        app = part_of(server, "flwr-serverapp")
        os.kill(app.pid, signal.SIGKILL)
        assert merge.exit_code(120) == 1, merge.said
        assert "run the same command again" in last_line(merge)
        assert no_result(network)

        # The whole server, in the middle of the next sum.
        merge = stack.enter_context(running("merge", network.coordinator))
        wait_until(lambda: "test" in offered(network, "phones"), "the next sum", 400)
        family = server.family()
        server.process.kill()
        assert psutil.wait_procs(family, 30)[1] == []  # nothing of it goes on by itself
        assert merge.exit_code(120) == 1, merge.said
        assert "amalgram server" in last_line(merge)
        assert no_result(network)

        stack.enter_context(running("server", network.coordinator)).wait_for("listening on")
        merge = stack.enter_context(running("merge", network.coordinator))
        assert merge.exit_code(600) == 0, merge.said
    report = read_report(network.folder / "output")
    assert (report["owners"], report["lost"]) == (list(OWNERS), {})
    assert {name: offered(network, name)["contribution"] for name in OWNERS} == given
    assert len({offered(network, name)["test"] for name in OWNERS}) == 1
    assert not (network.folder / "output" / "checkpoint").exists()
    simulated = simulated_twin(network, tmp_path / "simulated")
    assert report["digests"]["model"] == simulated["digests"]["model"]
    assert report["evaluation"] == simulated["evaluation"]
