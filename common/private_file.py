"""Files and folders that only their owner can read, and locks that keep two processes apart.

Files are 0600 and folders 0700. `write_whole` replaces a file whole or not at all, and it is on the disk before the
call returns, except in a simulation (`unsynced`). A key file is never overwritten, and a secret that others can read is
refused. A process that has read or written a key leaves no core dump, so that what it holds in memory does not end up
in a file when it crashes.
"""

import ctypes
import fcntl
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import BinaryIO

from common.errors import AmalgramError, SettingsError

MAX_SECRET_BYTES = 100_000
PIECE_BYTES = 1 << 23
POLL_SECONDS = 0.3
PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def make_private_folder(folder: Path) -> None:
    """Make a folder, and its parents, that nobody else can enter; close an existing one to others."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # check: folders-are-private


def create(path: Path, mode: int = 0o600) -> BinaryIO:  # check: files-are-private
    """Open a new file for writing. Raises FileExistsError if `path` exists, and never follows a link (O_EXCL)."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")


def take_room(file: BinaryIO, num_bytes: int) -> None:
    """Fill an empty file with so many zeros. Raises OSError if the disk has no room for them.

    Whoever maps a file takes its room in advance: writing to the mapping ends the process when the disk is full.
    """
    if sys.platform == "linux":
        os.posix_fallocate(file.fileno(), 0, num_bytes)  # check: room-is-taken-in-advance
        return
    for start in range(0, num_bytes, PIECE_BYTES):
        file.write(bytes(min(PIECE_BYTES, num_bytes - start)))
    file.flush()


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. After a crash at any point it holds either the old content or the new."""
    write_pieces_whole(path, (content,))


def write_pieces_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The same for a content that is too large to be in memory at once."""
    with written_whole(path) as file:
        for piece in pieces:
            file.write(piece)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """The same for a content that is written to a file within. If that raises, `path` holds the old content."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with create(partial) as file:
        yield file
    rename_whole(partial, path)


def rename_whole(path: Path, target: Path) -> None:
    """Give a file, which may have been written through a mapping, another name in its folder. After a crash at any
    point, whatever has the new name is whole.
    """
    _sync(path)
    path.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Put a file, or a folder's names, on the disk."""
    if not _syncs:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_syncs = True


@contextmanager
def unsynced() -> Iterator[None]:
    """While this is open, files are left to the system to put on the disk. They survive a process that is killed, but
    not a power cut. A simulation need not survive that, because nothing leaves its machine.
    """
    global _syncs
    before, _syncs = _syncs, False
    try:
        yield
    finally:
        _syncs = before


# --- keys ---


def write_key(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a key to a new file. Raises SettingsError if the file exists."""
    _forbid_core_dumps()  # check: writing-a-key-forbids-dumps
    try:
        with create(path, mode) as file:
            file.write(content)
    except FileExistsError:
        raise SettingsError(
            f"{path}: already exists, and a key is never overwritten", hint="choose another file name"
        ) from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror})") from None


def read_secret(path: Path) -> bytes:
    """The first 100 kB of a secret file. Raises SettingsError if other users may read it."""
    _forbid_core_dumps()  # check: reading-a-key-forbids-dumps
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MAX_SECRET_BYTES)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror})",
            hint="`amalgram keys` makes keys, and each stays on the machine where it was made",
        ) from None
    if mode & 0o077:
        raise SettingsError(f"{path}: other users may read this secret", hint=f"chmod 600 {path}")
    return content


def _forbid_core_dumps() -> None:
    """The limit keeps this process and its children from writing a core file. On Linux, the flag, which forks inherit,
    also keeps a program such as systemd-coredump from collecting one, and a debugger of the same user from attaching.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))  # check: no-core-files
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # check: no-collected-dumps


# --- locks ---


@contextmanager
def locked(path: Path, *, wait_seconds: float = inf, busy: AmalgramError | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the lock goes with the process, even one that is killed.

    Raises `busy` (by default BlockingIOError) if another process still holds the lock after `wait_seconds`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _take_lock(descriptor, wait=wait_seconds == inf):
            if time.monotonic() >= deadline:
                raise busy or BlockingIOError(f"{path}: another process holds this lock")
            time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(
            descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # check: one-process-at-a-time
    except BlockingIOError:
        return False
    return True
