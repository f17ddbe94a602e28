"""What happens when a disk is full while something large is written."""

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
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{folder}: {what} cannot be written here ({reason})", hint=hint) from None
