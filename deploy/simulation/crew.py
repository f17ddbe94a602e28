"""Processes that share out the calls of a simulation: this one, and helpers beside it (helper.py).

A small model's pass leaves most cores idle, however many threads it has, so owners answer side by side. A call is a
module's function with arguments that can be pickled. Until a helper has imported torch, which takes seconds, and while
all are busy, this process makes the calls.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import torch

from common.errors import HelperEnded
from deploy.launch.processes import stop_group
from deploy.simulation.helper import Done, Ready, Reply, Task

LARGE_BYTES = 200_000_000  # of weights: passes of such a model keep all cores busy
PROCESS_BYTES, MODEL_COPIES = 1_000_000_000, 4  # of memory, for each process
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def shares(owners: int, weight_bytes: int) -> tuple[int, int]:
    """How many processes compute for the owners of a simulation, and the threads of each.

    The cores are the threads that torch has now, so OMP_NUM_THREADS=1 leaves all calls to one process. Memory that is
    short means fewer processes, but not more threads: with another number of them, numbers are not bit-identical.
    """
    cores = torch.get_num_threads()
    if weight_bytes > LARGE_BYTES or torch.accelerator.is_available():
        return 1, cores
    side_by_side = min(cores, owners)
    fitting = _free_bytes() // (PROCESS_BYTES + MODEL_COPIES * weight_bytes)
    return max(1, min(side_by_side, fitting)), cores // side_by_side


def _free_bytes() -> int:
    """How much memory processes can have."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        free = min(free, int(MEMORY_LIMIT.read_text()))
    return free


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def sharing_cores(
    owners: int, weight_bytes: int, *, has_helpers: bool = True, most_threads: int | None = None
) -> Iterator["Crew"]:
    """A crew for the owners of a simulation. `most_threads`: for a process, however many cores there are."""
    processes, threads = shares(owners, weight_bytes)
    threads = min(threads, most_threads or threads)
    with Crew(processes - 1 if has_helpers else 0, threads) as crew, torch_threads(threads):
        yield crew


class Crew:
    """Calls by name. Each is made once, here or by a helper."""

    def __init__(self, helpers: int = 0, threads: int = 1) -> None:
        self._helpers: list[_Helper] = []
        with suppress(OSError):  # the system has no room for another process: fewer will do
            self._helpers.extend(_Helper(threads) for _ in range(helpers))
        self._told: list[Callable[[], object]] = []
        self._to_make: dict[str, Callable[[], Any]] = {}
        self._made: dict[str, Future[Any]] = {}

    def tell(self, function: Callable[..., object], *arguments: Any) -> None:
        """Make a call in this process now, and in each helper before its next one."""
        self._told.append(partial(function, *arguments))
        self._told[-1]()

    def add(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a call made, before its result is asked for if there are helpers."""
        self._to_make[name] = partial(function, *arguments)

    def result(self, name: str) -> Any:
        """What that call returned; raises what it raised. Raises HelperEnded if a helper was killed at work, and
        KeyError if there is no such call.
        """
        self._keep_helpers_busy()
        while name not in self._made:
            busy = {helper.doing: helper.connection for helper in self._helpers if helper.doing is not None}
            if name in self._to_make:
                self._make(name)
            elif name not in busy:
                raise KeyError(name)
            elif self._to_make and len(self._made) < len(self._helpers):
                self._make(next(iter(self._to_make)))  # rather than wait
            else:
                wait(busy.values())
            self._keep_helpers_busy()
        return self._made.pop(name).result()

    def in_order(self, function: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> Iterator[Any]:
        """What a function returns for each of several arguments."""
        names = [f"{function.__qualname__} {number}" for number in range(len(arguments))]
        for name, each in zip(names, arguments, strict=True):
            self.add(name, function, *each)
        for name in names:
            yield self.result(name)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the helpers. What they are doing is lost, as if they had been killed."""
        for helper in self._helpers:
            helper.end()
        self._helpers = []

    def _make(self, name: str) -> None:
        call, made = self._to_make.pop(name), Future[Any]()
        try:
            made.set_result(call())
        except Exception as error:
            made.set_exception(error)
        self._made[name] = made

    def _keep_helpers_busy(self) -> None:
        """Take what helpers have done, and give those that are ready something to do. One that ends while it starts is
        not missed. Few results wait to be asked for: each may be as large as a message.
        """
        for helper in list(self._helpers):
            self._made |= helper.take()
            if helper.has_failed:
                self._helpers.remove(helper)
                helper.end()
            elif helper.is_idle and self._to_make and len(self._made) < 2 * len(self._helpers):
                name = next(iter(self._to_make))
                helper.give(name, self._to_make.pop(name), self._told)


class _Helper:
    """One helper: its process, and what it is doing."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        path = [each or os.getcwd() for each in sys.path]  # its modules are the same
        program = f"from deploy.simulation.helper import main; main({theirs.fileno()}, {threads}, {os.getpid()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the other
            )
        self.is_ready = self.has_failed = False
        self.doing: str | None = None
        self._told = 0

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.doing is None

    def give(self, name: str, call: Callable[[], Any], told: Sequence[Callable[[], object]]) -> None:
        try:
            self.connection.send(Task(before=told[self._told :], call=call))
        except OSError:
            raise self._ended() from None
        self.doing, self._told = name, len(told)

    def take(self) -> dict[str, Future[Any]]:
        """What it has done, by name, if anything. Its log records go to the loggers here."""
        done: dict[str, Future[Any]] = {}
        while not self.has_failed and self.connection.poll():
            try:
                reply: Reply = self.connection.recv()
            except (EOFError, OSError):  # between two messages, or within one
                if self.is_ready:
                    raise self._ended() from None
                self.has_failed = True
                break
            if isinstance(reply, logging.LogRecord):
                if logging.getLogger(reply.name).isEnabledFor(reply.levelno):
                    logging.getLogger(reply.name).handle(reply)
            elif isinstance(reply, Ready):
                self.is_ready = True
            elif self.doing is not None:
                done[self.doing] = Future()
                if isinstance(reply, Done):
                    done[self.doing].set_result(reply.result)
                else:
                    done[self.doing].set_exception(reply.error)
                self.doing = None
        return done

    def _ended(self) -> HelperEnded:
        return HelperEnded(
            f"a process that computed for owners has ended (status {self._process.wait()}): it was probably killed",
            hint="run the same command again to resume; if memory was short, close other programs first",
        )

    def end(self) -> None:
        self.connection.close()
        stop_group(self._process)
