"""Watches what this process writes and sends, by an audit hook."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 - writes a cache of its own when it is first imported

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_watched: list[tuple[str, Any]] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if (
        event.startswith("socket.")
        or event in CHANGES
        or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
    ):
        _watched.append((event, arguments))


sys.addaudithook(_watch)  # cannot be removed, so `_watched` turns it on


@contextmanager
def watched() -> Iterator[list[tuple[str, Any]]]:
    """Whatever this process opens for writing, changes on the disk, or does with sockets."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def changed_paths(seen: list[tuple[str, Any]]) -> set[Path]:
    """The absolute paths of what was watched, except for the device that swallows everything."""
    found = {Path(str(each)) for _, arguments in seen for each in arguments[:2] if isinstance(each, str | Path)}
    return {path for path in found if path.is_absolute()} - {Path("/dev/null")}
