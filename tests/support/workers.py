"""Starts the workers of pytest-xdist as forks of the process that commands.py forks commands from.

A worker that starts as a process of its own imports torch and transformers before its first test, and so would its own
fork server. This way all of them share one process that has imported both. Linux only, as forking is elsewhere unsafe
or slow; there xdist starts its workers as it always does.
"""

import os
import sys
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from execnet import gateway_io
from execnet.gateway_base import Popen2IO

from tests.support.commands import process


class ForkedWorker(Popen2IO):
    """What execnet sees of a worker: where `Popen2IOMaster` would start Python, this forks it."""

    def __init__(self, arguments: list[str], execmodel: Any) -> None:
        (its_input, to_worker), (from_worker, its_output) = os.pipe(), os.pipe()
        streams = Connection(its_input, writable=False), Connection(its_output, readable=False)
        self._process = process(_become_worker, *streams)
        self._process.start()
        for stream in streams:
            stream.close()
        super().__init__(os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb"), execmodel)

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def fork_workers() -> None:
    """Call this in the process that starts workers, before it does."""
    if sys.platform == "linux":
        gateway_io.Popen2IOMaster = ForkedWorker  # type: ignore[misc, assignment]


def _become_worker(stdin: Connection, stdout: Connection) -> None:
    """Do what execnet asks a new Python to do: run the line that comes first on standard input."""
    # Python 3.11 would start another fork server for the commands of every worker.
    vars(forkserver)["_forkserver"].ensure_running = resource_tracker.ensure_running
    os.dup2(stdin.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    exec(eval(sys.stdin.readline()), {"__name__": "__main__"})
