"""Runs `amalgram` as a process of its own that need not import everything again.

Importing torch and transformers takes a process longer than most of what tests ask of it. So these processes are forks
of one that has imported both: Python's fork server. What a command does, prints and exits with stays the same;
test_cli.py starts some as a person does, to show that. Nor do they fine-tune a model that another test has
fine-tuned (once.py), or wait for the disk.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, run
from tempfile import TemporaryFile
from typing import IO

from deploy.cli import main
from deploy.terminal import QUIET

os.environ |= QUIET  # what the command sets before it imports transformers
IMPORTED = (
    "hypothesis",  # first, as in a process that imports it for the first test: it looks at what is imported already
    "deploy.simulation.simulate",
    "deploy.commands.agree",
    "tests.support.once",
    "transformers.models.bert.modeling_bert",
    "tests.support.frozen",
)
OURS = ("client", "common", "deploy", "server")
FUZZERS = ("fuzz", "fuzz_files", "fuzz_state")  # what is read from the wire, from files, from whole documents
FUZZING_SECONDS = int(os.environ.get("FUZZING_SECONDS", "3600"))  # of all of them together, in `make test-all`
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__, *IMPORTED])


@dataclass(frozen=True)
class Command:
    """A command that is running; `stdout` and `stderr` give what it says, as it says it."""

    process: BaseProcess
    stdout: IO[str]
    stderr: IO[str]

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self, seconds: float = 300.0) -> int:
        """What it exits with: wait for that. Negative if a signal ended it, as in `subprocess`."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the command does not end"
        return self.process.exitcode


def amalgram(
    *arguments: str | Path, cwd: Path, program: Path | None = None, **environment: str
) -> CompletedProcess[str]:
    """Run `amalgram ARGUMENTS` in the folder `cwd` to its end; of the copy of our packages in `program`, if given."""
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        process = fork(arguments, cwd, environment, stdout.fileno(), stderr.fileno(), program=program)
        exit_code = Command(process, stdout, stderr).exit_code()
        stdout.seek(0)
        stderr.seek(0)
        return CompletedProcess(arguments, exit_code, stdout.read(), stderr.read())


@contextmanager
def started(*arguments: str | Path, cwd: Path, terminal: int | None = None, **environment: str) -> Iterator[Command]:
    """`amalgram ARGUMENTS`, running. `terminal`, a file descriptor, takes the place of its standard error."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    process = fork(arguments, cwd, environment, its_out, its_err if terminal is None else terminal)
    os.close(its_out)
    os.close(its_err)
    with os.fdopen(out) as stdout, os.fdopen(err) as stderr:
        try:
            yield Command(process, stdout, stderr)
        finally:
            process.kill()
            process.join()


def fork(
    arguments: tuple[str | Path, ...],
    cwd: Path,
    environment: dict[str, str],
    *streams: int,
    program: Path | None = None,
) -> BaseProcess:
    """`amalgram ARGUMENTS` in the folder `cwd`, begun. `streams`: the descriptors of its standard output and error."""
    sent = [Connection(os.dup(stream), readable=False) for stream in streams]  # how multiprocessing sends a descriptor
    whole = dict(os.environ) | environment
    forked = process(_run, [*map(str, arguments)], str(cwd), program, whole, *sent)
    forked.start()
    return forked


def process(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that will call `target`, once it is started: a fork of the one that has imported what all need."""
    return _forks.Process(target=target, args=arguments)


def fuzz(module: str, artifacts: Path) -> CompletedProcess[str]:
    """Run a coverage-guided fuzzer of this folder for its share of the hour. What it finds goes to `artifacts`."""
    seconds = FUZZING_SECONDS // len(FUZZERS)
    options = [f"-max_total_time={seconds}", "-max_len=4000", "-seed=1", f"-artifact_prefix={artifacts}/"]
    command = [sys.executable, "-m", f"tests.support.{module}", *options]
    root = Path(__file__).parents[2]
    return run(
        command, cwd=root, capture_output=True, text=True, errors="replace", check=False, timeout=2 * seconds + 300
    )


def _run(
    arguments: list[str],
    cwd: str,
    program: Path | None,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    os.dup2(stdout.fileno(), sys.stdout.fileno())
    os.dup2(stderr.fileno(), sys.stderr.fileno())
    stdout.close()
    stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _train_once()
    vars(os)["fsync"] = lambda descriptor: None  # as in the tests themselves: no power is cut (fixtures.py)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have them ignore it
    sys.argv = ["amalgram", *arguments]
    command = main if program is None else _main_of(program)
    command()


def _train_once() -> None:
    from client.measurement import fine_tuning  # the fork server has imported both
    from tests.support.once import TRAINED, trained_once

    if os.environ.get(TRAINED):
        vars(fine_tuning)["fine_tune"] = trained_once(fine_tuning.fine_tune, Path(os.environ[TRAINED]))


def _main_of(program: Path) -> Callable[[], None]:
    """The command of another copy of our packages, imported from there; the libraries stay imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path.insert(0, str(program))
    from deploy.cli import main

    assert program in Path(main.__code__.co_filename).parents
    return main
