"""Children of ours: started, watched, and ended by their process group, with everything they started themselves."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from common.errors import EngineError, SettingsError
from common.private_file import locked

START_SECONDS, STOP_SECONDS, POLL_SECONDS, PARENT_POLL_SECONDS = 60.0, 20.0, 0.5, 0.2
Process = subprocess.Popen[bytes]


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], folder: Path, log_file: Path) -> Iterator[Process]:
    """A child in a session of its own, its output added to `log_file` (0600). Ended when the block is left."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            stop_group(process)


def alone(folder: Path, command: str) -> AbstractContextManager[None]:
    """Keep other processes from running `command` in this folder. Entering raises SettingsError if one already does."""
    busy = SettingsError(
        f"{folder}: another `amalgram {command}` is already running here", hint="wait until it ends, or stop it"
    )
    return locked(folder / f"{command}.lock", wait_seconds=0, busy=busy)


def listens(port: int) -> bool:
    """Whether a program of this machine listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for_port(port: int, process: Process, log_file: Path) -> None:
    """Return once something listens on `port` of this machine. Raises EngineError if `process` ends, or takes long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if listens(port) and process.poll() is None:
            return
        time.sleep(POLL_SECONDS)
    raise EngineError(f"{log_file.stem} did not start on port {port}: {last_line(log_file) or 'it said nothing'}")


def last_line(log_file: Path) -> str:
    """The last line that says something."""
    lines = log_file.read_text(errors="replace").splitlines() if log_file.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def stop_group(process: Process) -> None:
    """End a child and what it started: asked first, then made to."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(STOP_SECONDS)
        except (ProcessLookupError, PermissionError):
            process.poll()
            return
        except subprocess.TimeoutExpired:
            continue


def end_group_with(pid: int) -> None:
    """Kill this process group, including this process, once process `pid` has ended."""
    import psutil  # not at the start of every command

    while psutil.pid_exists(pid):
        time.sleep(PARENT_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FollowedFile:
    """A text file that another process is adding lines to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = path.stat().st_size if path.is_file() else 0

    def new_lines(self) -> list[str]:
        """Whole lines that were added since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        return whole.decode(errors="replace").splitlines()


class NewFiles:
    """A folder into which another process writes files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = set(self._files())

    def since_last_time(self) -> list[Path]:
        """The files that were not there at the last call."""
        new = [path for path in self._files() if path not in self._seen]
        self._seen.update(new)
        return new

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.json") if path.is_file())
