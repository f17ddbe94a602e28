"""A whole merge over TLS on this machine: the commands of every party, each as a process of its own.

The rehearsal before the real thing, and the same code: a guarded server, a pinned node for every owner, and a merge.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError
from deploy.commands.merge import merge
from deploy.launch.processes import POLL_SECONDS, Process, started

START_SECONDS = 180.0
log = logging.getLogger("amalgram.simulate")


def run_over_network(coordinator_file: Path, party_files: Sequence[Path]) -> None:
    """Run the merge of parties that are set up for a network. Raises the error that the merge met, or that keeps one
    of the parties from starting.
    """
    with ExitStack() as stack:

        def start(command: str, settings: Path) -> "Party":
            said = settings.with_suffix(f".{command}.log")
            said.unlink(missing_ok=True)
            full = [sys.executable, "-P", "-m", "amalgram", command, str(settings)]
            return Party(settings.stem, stack.enter_context(started(full, os.environ, settings.parent, said)), said)

        log.info("starting a server and %d clients, each a process of its own", len(party_files))
        start("server", coordinator_file).wait_until_it_says("listening on ")
        for client in [start("client", path) for path in party_files]:
            client.wait_until_it_says("connected to the coordinator")
        merge(coordinator_file)


@dataclass(frozen=True)
class Party:
    """A party's command that is running, and where it writes what it says."""

    name: str
    process: Process
    said: Path

    def wait_until_it_says(self, words: str) -> None:
        """Raises EngineError if it ends without these words, or takes long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            has_ended, text = self.process.poll() is not None, self.said.read_text(errors="replace")
            if words in text:
                return
            if has_ended or time.monotonic() > deadline:
                errors = [line for line in text.splitlines() if line.startswith("error: ")]
                reason = errors[-1].removeprefix("error: ") if errors else "it did not get ready"
                raise EngineError(f"{self.name}: {reason}", hint=f"{self.said} has all that it said")
            time.sleep(POLL_SECONDS)
