"""Starts Flower's apps by forking a process that has already imported what they import.

Flower starts a process for every message. Importing torch and transformers takes such a process longer than most of
its work. Here one process imports them once, when the first app is asked for, and every app is a fork of it. The first
app waits no longer than if it imported them itself, and a node that waits for a merge holds none of them in memory.

The fork server is itself forked before this process has any Python thread, and never starts one: a fork copies only the
calling thread, so a lock that another thread holds would stay locked for ever. The libraries that it imports may have
native threads only if they stop them at a fork, as OpenBLAS does. pyarrow does not; each app imports it for itself.

Only third-party libraries are imported ahead. The app's own modules come from the bundle that its owner consented to,
so the fork server refuses to fork once one of them has been imported from the program that is installed here.
Apps share no random numbers: the protocol's come from the operating system, and nothing uses numpy's global generator.

Linux only. Elsewhere, and after the fork server has died, Flower starts a process for every app as it always does.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

OF_THE_BUNDLE = ("client", "common", "server")  # top-level packages: never imported ahead
LONGEST_REQUEST = 65_536  # bytes of one message on a socket of this kind
Program = Callable[[], Any]


class ForkServer:
    """The launching side: starts the fork server, and asks it for one process after the other."""

    def __init__(self, programs: Mapping[str, Program], libraries: Iterable[str]) -> None:
        """`programs` by the name of their command. Call this before any thread exists."""
        self._programs = programs
        self._connection: socket.socket | None = None
        if sys.platform != "linux":
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            _run_in_fork(programs, _serve(theirs, libraries))
        theirs.close()
        self._connection = ours

    def start(self, command: Sequence[str], **streams: Any) -> None:
        """Start `command` as `subprocess.Popen` would, by a fork if it is one of the programs."""
        quiet = streams.get("stdout") == subprocess.DEVNULL
        request = json.dumps({"command": list(command), "quiet": quiet}).encode()
        if self._connection is not None and command[0] in self._programs:
            with suppress(OSError):  # the fork server is gone
                self._connection.send(request)
                return
        subprocess.Popen(command, **streams)


def _serve(connection: socket.socket, libraries: Iterable[str]) -> Mapping[str, Any]:
    """Fork for every request. Returns in each fork, with its request; ends with whoever asks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears away forks that have ended
    set_name("fork-server")
    imported = False
    while True:
        content = connection.recv(LONGEST_REQUEST)
        if not content:  # whoever asks has ended
            os._exit(0)
        if not imported:
            _import(libraries)
            imported = True
        check_nothing_of_the_bundle(sys.modules)
        if os.fork() == 0:
            connection.close()
            request: Mapping[str, Any] = json.loads(content)
            return request


def _import(libraries: Iterable[str]) -> None:
    for library in libraries:
        with suppress(ImportError):  # an app that needs it says so
            importlib.import_module(library)
    gc.collect()
    gc.freeze()  # the forks' garbage collectors leave these objects alone, so their memory stays shared


def _run_in_fork(programs: Mapping[str, Program], request: Mapping[str, Any]) -> None:
    """Become the program that was asked for, and end with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["quiet"]:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    sys.argv = list(request["command"])
    set_name(sys.argv[0])
    sys.exit(programs[sys.argv[0]]())


def check_nothing_of_the_bundle(modules: Iterable[str]) -> None:
    """Raise RuntimeError if a module of the app is imported already: Flower would run it instead of the bundle's."""
    found = [name for name in modules if name.partition(".")[0] in OF_THE_BUNDLE]
    if found:
        raise RuntimeError(f"{found[0]} was imported from the installed program; no app is started")


def set_name(name: str) -> None:
    """Show this process under `name` in ps and top. Linux."""
    Path("/proc/self/comm").write_text(name)
