"""`amalgram merge`: has the coordinator's server run the merge, shows its progress, and reports how it ended.

The merge itself runs in an app process of the server, which writes model and report. When the command is run again
after a failure or a kill, it ends what is left of Flower's earlier run and resumes from OUT/checkpoint.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from common.errors import AmalgramError, EngineError, TooFewOwners
from common.text import some_of
from deploy.commands.report import show_report
from deploy.commands.server import Place, find_place
from deploy.launch.flower import CONNECTION, FAILURE, check_not_over, flwr, raise_failure, submit, wait_for_run
from deploy.launch.processes import FollowedFile, alone
from deploy.terminal import progress_below_log
from server.output_folder import PROGRESS, claim_output
from server.report.report import holds_result_of, read_report

POLL_SECONDS, PATIENCE_SECONDS = 2.0, 5.0
log = logging.getLogger("amalgram.merge")


def merge_and_show(settings_file: Path) -> None:
    """Run the merge and show its report."""
    with progress_below_log():
        output = merge(settings_file)
    show_report(read_report(output), output)


def merge(settings_file: Path) -> Path:
    """Run the merge that the coordinator's settings describe, and return its output folder. Raises the AmalgramError
    that the merge met. If it is over already, nobody is asked again.
    """
    place = find_place(settings_file)
    claim_output(place.output)
    if holds_result_of(place.output, place.agreement.digest()):
        log.info("this agreement is merged already; nobody was asked again")
        return place.output
    check_not_over(place.output, place.agreement.digest())
    with alone(place.output, "merge"):
        _end_earlier_runs(place)
        _wait_for_owners(place)
        for old in (FAILURE, PROGRESS):
            (place.output / old).unlink(missing_ok=True)
        raise_failure(place.output, _run(place.environment, settings_file, place.output / PROGRESS))
    from server.report.page import render_report  # matplotlib: not before the merge is over

    render_report(place.output)
    return place.output


def _run(environment: Mapping[str, str], settings_file: Path, progress_file: Path) -> str:
    """Submit a run, show its progress, and return its status once it has ended."""
    progress = Progress(FollowedFile(progress_file))
    run_id = submit(environment, settings_file.resolve())
    try:
        return wait_for_run(environment, run_id, progress.show)
    except EngineError as error:
        raise EngineError(
            f"the server stopped answering during the run ({error.message})",
            hint="check that `amalgram server` runs, and run the same command again to resume",
        ) from None
    except BaseException:  # an interrupt too: nobody would watch the run any more
        with suppress(AmalgramError):
            flwr(environment, "stop", run_id, CONNECTION)
        raise


class Progress:
    """Logs what the coordinator's app reports, and names the owners that keep the others waiting."""

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
                self._waiting_for = f"{told['step']}: waiting for {some_of(told['waiting_for'])}"
                self._say_at = time.monotonic() + PATIENCE_SECONDS if told["waiting_for"] else math.inf
        if time.monotonic() > self._say_at:
            self._say(self._waiting_for)
            self._say_at = math.inf


def _end_earlier_runs(place: Place) -> None:
    """End the runs that a killed command left behind: their apps would write into the same output."""
    if not place.nodes_file.is_file():
        raise EngineError(
            f"{place.nodes_file}: is missing", hint="start `amalgram server` first and wait until it listens"
        )
    environment = place.environment
    answer = flwr(environment, "list", CONNECTION)
    if "runs" not in answer:
        raise EngineError(f"no server answers on port {place.host_and_port[1]}", hint="is `amalgram server` running?")
    left = [str(run["run-id"]) for run in answer["runs"] if not str(run["status"]).startswith("finished")]
    for run_id in left:
        log.info("ending run %s, left behind by an earlier command", run_id)
        flwr(environment, "stop", run_id, CONNECTION)
        wait_for_run(environment, run_id, lambda: None)


def _wait_for_owners(place: Place) -> None:
    """Return once enough owners' nodes are connected, and log who is missing meanwhile. Raises TooFewOwners after the
    agreement's reply timeout. The run itself waits that long again for the owners that are still missing.
    """
    agreement = place.agreement
    owner_of = {node: owner for owner, node in json.loads(place.nodes_file.read_bytes()).items()}
    deadline = time.monotonic() + agreement.summation.reply_timeout_seconds
    say = _say_changes()
    while True:
        answer = flwr(place.environment, "supernode", "list", CONNECTION)
        online = {owner_of.get(node["node-id"]) for node in answer.get("nodes", ()) if node["status"] == "online"}
        missing = [name for name in agreement.owner_names if name not in online]
        say(f"waiting for {some_of(missing)}" if missing else "all owners are connected")
        if len(agreement.owners) - len(missing) >= agreement.needed_owners:
            return
        if time.monotonic() > deadline:
            raise TooFewOwners(
                f"{len(agreement.owners) - len(missing)} owners are connected, the agreement needs at least "
                f"{agreement.needed_owners}",
                hint=f"`amalgram client` must run at: {some_of(missing)}",
            )
        time.sleep(POLL_SECONDS)


def _say_changes() -> Callable[[str], None]:
    """A function that logs a text unless it is the same as the last one."""
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            log.info("%s", text)
        last = text

    return say
