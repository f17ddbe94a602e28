"""What a command shows: its answer on standard output; log lines, hints and progress on standard error.

While a run lasts, its log lines have rows below them, one for the run and one for each owner. Everything in these rows
comes from the coordinator's log records, which hold only what the coordinator is sent anyway: who has answered, and how
much of each vector has arrived. The rows show a remaining time only while a vector arrives, because only then the
amount that is left is known.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import get_console, reconfigure
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
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

from common.logs import JsonLines, TextLines
from common.text import shown, shown_lines

MAX_OWNER_ROWS = 12  # more owners share one row
MAX_QUOTED_CHARACTERS = 400
CLOCK = "%H:%M:%S"
QUIET = {  # the libraries' own warnings and progress bars; their errors still arrive as exceptions
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
log = logging.getLogger("amalgram")


def messages() -> Console:
    """The console on standard error. It is rich's global one, so that every progress bar of this process shares it."""
    console = get_console()
    if not console.stderr:
        reconfigure(stderr=True)
    return console


def set_up_output(as_json: bool) -> None:
    """Send log lines to standard error, as text for people or as JSON lines, with every owner's answer, for programs.

    The libraries that are imported afterwards keep quiet, unless the environment says otherwise.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    console = messages()
    handler: logging.Handler
    if as_json:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
    elif console.is_terminal:
        handler = RichHandler(
            logging.INFO, console=console, show_level=False, show_path=False, markup=False, log_time_format=CLOCK
        )
        handler.setFormatter(TextLines("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setLevel(logging.INFO)
        handler.setFormatter(TextLines("%(asctime)s %(message)s", CLOCK))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def shows_json() -> bool:
    """Whether the command was called with --json."""
    return any(isinstance(handler.formatter, JsonLines) for handler in log.handlers)


def answer(found: dict[str, Any], text: str = "", hint: str = "") -> None:
    """Print a command's answer: `found` as one JSON object, or `text`, with the next step on standard error."""
    if shows_json():
        print(json.dumps(found, indent=2), flush=True)
        return
    if text:
        print(shown_lines(text), flush=True)
    if hint:
        messages().print(shown_lines(hint), soft_wrap=True, markup=False, highlight=False)


def show_error(message: str, hint: str) -> None:
    """Show an error on standard error, as text in one or two lines."""
    message, hint = shown(message), shown(hint)  # check: errors-are-escaped
    messages().print("[red]error:[/]", escape(message), soft_wrap=True, highlight=False)
    if hint:
        messages().print("[yellow]hint:[/]", escape(hint), soft_wrap=True, highlight=False)


def quoted(text: str) -> str:
    """Somebody's words in plain characters, cut to a long sentence."""
    return ascii(text)[1:-1][:MAX_QUOTED_CHARACTERS]


def byte_count(count: int) -> str:
    """A number of bytes for people."""
    if count >= 10_000_000_000:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def about_bytes(count: int) -> str:
    """The same of an estimate, to two digits."""
    return byte_count(round(count, 2 - len(str(count)))).replace(".0 ", " ")


def as_lines(found: dict[str, str]) -> str:
    """One `name  value` line per entry."""
    return "\n".join(f"{name.replace('_', ' '):<12} {shown(value)}" for name, value in found.items())


@contextmanager
def progress_below_log() -> Iterator[None]:
    """Keep the rows of a run below its log lines, if standard error is a terminal that a person reads."""
    console = messages()
    if not console.is_terminal or shows_json():
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
    with Progress(*columns, console=console, transient=True) as progress:
        rows = _Rows(progress)
        log.addHandler(rows)
        try:
            yield
        finally:
            log.removeHandler(rows)


@contextmanager
def one_bar() -> Iterator[None]:
    """Show the steps of a run as one bar, for scripts and notebooks."""
    level = log.level
    columns = BarColumn(20), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = _OneBar(progress)
        log.addHandler(bar)
        log.setLevel(min(logging.INFO, level or logging.INFO))
        try:
            yield
            bar.end()
        finally:
            log.setLevel(level)
            log.removeHandler(bar)


class _OneBar(logging.Handler):
    """Moves one bar on at each step of a run, from the `about` of the coordinator's records."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress
        self._bar = progress.add_task("preparing", total=None)

    def emit(self, record: logging.LogRecord) -> None:
        about: dict[str, Any] = getattr(record, "about", {})
        if "number" in about:
            done, step = about["number"] - 1, shown(about["step"])
            self._progress.update(self._bar, total=about["num_steps"], completed=done, description=step)

    def end(self) -> None:
        self._progress.update(self._bar, completed=self._progress.tasks[0].total, description="merged")


class _Arrived(ProgressColumn):
    """A column for the rows that count a vector's bytes, empty until the first bytes arrive."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if self._applies(task) else ""

    def _applies(self, task: Task) -> bool:
        return bool(task.fields["counts_bytes"] and task.completed)


class _Arriving(_Arrived):
    """A column for the same rows, filled only while parts arrive at a known rate."""

    def _applies(self, task: Task) -> bool:
        return super()._applies(task) and task.speed is not None and not task.finished


class _Rows(logging.Handler):
    """Updates a row for the run and a row for each owner from the `about` of the coordinator's records."""

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
                state = "answered" if done & set(names) else "at work" if waiting & set(names) else "dropped out"
            self._progress.update(row, completed=sum(arrived.get(name, 0) for name in names), state=state)

    def _row(self, description: str, total: float | None, *, counts_bytes: bool, completed: int = 0) -> TaskID:
        return self._progress.add_task(
            shown(description), total=total, completed=completed, counts_bytes=counts_bytes, state=""
        )

    def _clear(self) -> None:
        for row in self._progress.task_ids:
            self._progress.remove_task(row)
        self._owners = {}
