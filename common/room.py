"""What happens when a disk is full while a model is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.errors import DataError, first_line


@contextmanager
def needing_room(what: str, folder: Path, hint: str) -> Iterator[None]:
    """While open, `what` is written below `folder`. Raises DataError if the disk is full, or the like."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: {what} cannot be written here ({first_line(error)})", hint=hint) from None
