"""A process that makes calls for the one that started it (crew.py).

It says when it is ready, and then answers each task with what the call returned or raised. In between, it passes on
what is logged. Everything travels as pickles, between these two processes only.
"""

import logging
import pickle
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from common.errors import AmalgramError
from deploy.launch.processes import end_group_with


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a helper is sent: the call whose result is wanted, and those that must have been made before."""

    before: Sequence[Callable[[], object]]
    call: Callable[[], Any]


@dataclass(frozen=True)
class Ready:
    """What a helper sends once it has imported what calls need."""


@dataclass(frozen=True)
class Done:
    result: Any


@dataclass(frozen=True)
class Failed:
    error: Exception


Reply = logging.LogRecord | Ready | Done | Failed


def main(descriptor: int, threads: int, helped: int) -> None:
    """Help until process `helped` closes the connection, or ends. `threads`: of torch.

    Must be run at the head of a process group of its own.
    """
    threading.Thread(target=end_group_with, args=(helped,), daemon=True).start()  # whatever this one is doing
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _help(Connection(descriptor), threads)


def _help(connection: Connection, threads: int) -> None:
    log = logging.getLogger("amalgram")
    log.addHandler(_PassOn(connection))
    log.setLevel(logging.DEBUG)  # the other process knows which records it wants
    log.propagate = False
    import torch
    import transformers

    from common.private_file import unsynced
    from deploy.simulation import simulate  # noqa: F401  # whose imports are all that calls need

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    connection.send(Ready())
    with unsynced():
        while True:
            connection.send(_reply(connection.recv()))


def _reply(task: Task) -> Done | Failed:
    try:
        for call in task.before:
            call()
        return Done(task.call())
    except AmalgramError as error:
        return Failed(_that_travels(error))
    except Exception as error:
        error.add_note(traceback.format_exc())  # which does not travel by itself
        return Failed(_that_travels(error))


def _that_travels(error: Exception) -> Exception:
    """The error, or one that says the same if it is of a kind that cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _PassOn(QueueHandler):
    """Sends log records to the process that this one helps: their messages, not the exceptions that they are about."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)  # type: ignore[arg-type]  # which `enqueue` alone uses
        self.setFormatter(_MessageAlone())

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)  # type: ignore[attr-defined]


class _MessageAlone(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()
