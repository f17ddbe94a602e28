"""A bar for a loop that takes long, below what a command says."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import get_console
from rich.progress import track

T = TypeVar("T")


def with_bar(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    """`steps`, with a bar on standard error while they are taken, if that is a terminal."""
    console = get_console()  # commands have it write to standard error; a script that asks for no bar has not
    is_shown = console.stderr and console.is_terminal
    yield from track(steps, description, total, console=console, disable=not is_shown, transient=True)
