"""Files that only their owner reads: 0600, written whole or not at all, and on the disk before the call returns."""

import os
from pathlib import Path
from typing import BinaryIO


def make_private_folder(folder: Path) -> None:
    """A folder that nobody else can enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def create(path: Path) -> BinaryIO:
    """A new file, to be written. Raises FileExistsError if there is one."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` by `content`. After a crash at any point it holds the old or the new content."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with create(partial) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
