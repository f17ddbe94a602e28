"""What a person at a terminal sees of a run while it lasts: log lines, and below them where the run and its owners are.

Everything shown comes from the coordinator's log records, so it is what the coordinator is sent anyway: who has
answered, and how much of its vector has come. A remaining time is shown only while a vector is on its way, since of
nothing else it is known how much is left.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import get_console, reconfigure
from rich.console import RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from common.logs import JsonLines

MAX_OWNER_ROWS = 12  # more owners share one row
CLOCK = "%H:%M:%S"
reconfigure(
    stderr=True
)  # whoever shows progress (client/measurement/fine_tuning.py does, too) does so on this one console
messages = get_console()
log = logging.getLogger("amalgram")


def show_log(as_json: bool) -> None:
    """Log lines to standard error: for people, or with every owner's answer as well, for programs."""
    handler: logging.Handler
    if as_json:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
    elif messages.is_terminal:
        handler = RichHandler(
            logging.INFO, console=messages, show_level=False, show_path=False, markup=False, log_time_format=CLOCK
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", CLOCK))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def shows_json() -> bool:
    """Whether log lines are JSON objects."""
    return any(isinstance(handler.formatter, JsonLines) for handler in log.handlers)


@contextmanager
def progress_below_log() -> Iterator[None]:
    """Keep the rows of a run below its log lines, where standard error is a terminal that a person reads."""
    if not messages.is_terminal or shows_json():
        yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        _Arrived(DownloadColumn()),
        _Arriving(TransferSpeedColumn()),
        _Arriving(TimeRemainingColumn(compact=True)),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        rows = _Rows(progress)
        log.addHandler(rows)
        try:
            yield
        finally:
            log.removeHandler(rows)


class _Arrived(ProgressColumn):
    """A column for rows that count the bytes of a vector, once some have come."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if self._applies(task) else ""

    def _applies(self, task: Task) -> bool:
        return bool(task.fields["counts_bytes"] and task.completed)


class _Arriving(_Arrived):
    """A column for the same rows, while parts are coming and it is known how fast."""

    def _applies(self, task: Task) -> bool:
        return super()._applies(task) and task.speed is not None and not task.finished


class _Rows(logging.Handler):
    """One row for the run, one for each owner, kept by what the coordinator's records have in `about`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._owners: dict[str, TaskID] = {}

    def emit(self, record: logging.LogRecord) -> None:
        about: dict[str, Any] = getattr(record, "about", {})
        if "number" in about:
            self._start_step(about)
        elif "waiting_for" in about:
            self._take_answers(about)
        elif about.get("step") == "finish":
            self._clear()

    def _start_step(self, about: Mapping[str, Any]) -> None:
        self._clear()
        title = f"step {about['number']} of {about['num_steps']}: {about['step']}"
        self._row(title, about["num_steps"], counts_bytes=False, completed=about["number"] - 1)
        owners, each = about["owners"], about["payload_bytes_each"]
        if len(owners) > MAX_OWNER_ROWS:
            together = self._row(f"  {len(owners)} owners", len(owners) * each or None, counts_bytes=each > 0)
            self._owners = dict.fromkeys(owners, together)
        else:
            self._owners = {name: self._row(f"  {name}", each or None, counts_bytes=each > 0) for name in owners}

    def _take_answers(self, about: Mapping[str, Any]) -> None:
        done, waiting, arrived = set(about["done"]), set(about["waiting_for"]), about["payload_bytes"]
        for row in dict.fromkeys(self._owners.values()):
            names = [name for name, each in self._owners.items() if each == row]
            if len(names) > 1:
                state = f"{len(done)} of {len(names)} answered"
            else:
                state = "answered" if done & set(names) else "at work" if waiting & set(names) else "lost"
            self._progress.update(row, completed=sum(arrived.get(name, 0) for name in names), state=state)

    def _row(self, description: str, total: float | None, *, counts_bytes: bool, completed: int = 0) -> TaskID:
        return self._progress.add_task(
            description, total=total, completed=completed, counts_bytes=counts_bytes, state=""
        )

    def _clear(self) -> None:
        for row in self._progress.task_ids:
            self._progress.remove_task(row)
        self._owners = {}
