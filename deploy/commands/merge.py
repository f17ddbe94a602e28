"""`amalgram merge`: has the coordinator's server run the merge, shows how far it is, and tells how it ended.

The merge itself runs in the server's app process, which writes model and report. Run again after a failure, or after
anything was killed, this command ends what is left of Flower's earlier run and goes on from OUT/checkpoint.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import AmalgramError, EngineError, TooFewOwners
from deploy.commands.server import Place, find_place
from deploy.launch.flower import CONNECTION, FAILURE, flwr, raise_failure, submit, wait_for_run
from deploy.launch.processes import FollowedFile, alone
from server.app import PROGRESS
from server.merge import claim_output
from server.report.page import render_report

POLL_SECONDS, PATIENCE_SECONDS = 2.0, 30.0
log = logging.getLogger("amalgram.merge")


def merge(settings_file: Path) -> Path:
    """Run the merge of the coordinator's settings file; returns its output. Raises the AmalgramError that it met."""
    place = find_place(settings_file)
    environment = place.environment
    claim_output(place.output)
    with alone(place.output, "merge"):
        _end_earlier_runs(place)
        _wait_for_owners(place)
        for old in (FAILURE, PROGRESS):
            (place.output / old).unlink(missing_ok=True)
        progress = Progress(FollowedFile(place.output / PROGRESS))
        run_id = submit(environment, settings_file.resolve())
        try:
            status = wait_for_run(environment, run_id, progress.show)
        except EngineError as error:
            raise EngineError(
                f"the server went away in the middle ({error}); see that `amalgram server` runs, and run the same "
                "command again: it goes on where this one was"
            ) from None
        except BaseException:  # an interrupt too: nobody would be there to see the run's end
            with suppress(AmalgramError):
                flwr(environment, "stop", run_id, CONNECTION)
            raise
        raise_failure(place.output, status)
    render_report(place.output)
    return place.output


class Progress:
    """Passes on what the coordinator's app tells, and says who keeps the others waiting."""

    def __init__(self, file: FollowedFile) -> None:
        self._file = file
        self._say = _say_changes()
        self._waiting_for = ""
        self._say_at = math.inf

    def show(self) -> None:
        for line in self._file.new_lines():
            told = json.loads(line)
            about = {key: value for key, value in told.items() if key not in ("time", "level", "logger", "message")}
            level = logging.getLevelNamesMapping()[told["level"].upper()]
            log.log(level, "%s", told["message"], extra={"about": about})
            if "waiting_for" in told:
                self._waiting_for = f"{told['step']}: waiting for {', '.join(told['waiting_for'])}"
                self._say_at = time.monotonic() + PATIENCE_SECONDS if told["waiting_for"] else math.inf
        if time.monotonic() > self._say_at:
            self._say(self._waiting_for)
            self._say_at = math.inf


def _end_earlier_runs(place: Place) -> None:
    """Whoever was killed while waiting for a run left it running; its app would write into the same output."""
    if not place.nodes_file.is_file():
        raise EngineError(f"{place.nodes_file}: is missing; start `amalgram server` first and wait until it listens")
    environment = place.environment
    answer = flwr(environment, "list", CONNECTION)
    if "runs" not in answer:
        raise EngineError(f"no server answers on port {place.host_and_port[1]}; is `amalgram server` running?")
    left = [str(run["run-id"]) for run in answer["runs"] if not str(run["status"]).startswith("finished")]
    for run_id in left:
        log.info("ending run %s, which an earlier command left behind", run_id)
        flwr(environment, "stop", run_id, CONNECTION)
        wait_for_run(environment, run_id, lambda: None)


def _wait_for_owners(place: Place) -> None:
    """Return once enough owners' nodes are connected, and say who is missing meanwhile. Raises TooFewOwners when the
    agreement's reply timeout is over first. The run itself waits as long again for those that are still missing.
    """
    agreement = place.agreement
    owner_of = {node: owner for owner, node in json.loads(place.nodes_file.read_bytes()).items()}
    deadline = time.monotonic() + agreement.summation.reply_timeout_seconds
    say = _say_changes()
    while True:
        answer = flwr(place.environment, "supernode", "list", CONNECTION)
        online = {owner_of.get(node["node-id"]) for node in answer.get("nodes", ()) if node["status"] == "online"}
        missing = [name for name in agreement.owner_names if name not in online]
        say(f"waiting for {', '.join(missing)}" if missing else "all owners are connected")
        if len(agreement.owners) - len(missing) >= agreement.needed_owners:
            return
        if time.monotonic() > deadline:
            raise TooFewOwners(
                f"{len(agreement.owners) - len(missing)} owners are connected, the agreement needs "
                f"{agreement.needed_owners}; missing: {', '.join(missing)}"
            )
        time.sleep(POLL_SECONDS)


def _say_changes() -> Callable[[str], None]:
    """A function that logs what it is given, unless that is what it was given last."""
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            log.info("%s", text)
        last = text

    return say
