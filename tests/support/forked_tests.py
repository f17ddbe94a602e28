"""Runs tests of a source tree over and over, each time in a fork of a process that has imported the libraries.

A program of its own, which imports nothing of ours: whatever the tree holds when a fork begins is what its tests run.
Each line on standard input is a JSON list: the tree's folder, then the arguments for pytest. Each line on standard
output is another: the exit code, then what pytest printed.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

LIBRARIES = (  # without pyarrow, whose threads do not survive a fork
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "hypothesis",
    "matplotlib.figure",
    "peft",
    "pytest",
    "sklearn.metrics",
    "torch",
    "transformers.models.bert.modeling_bert",
    "typer",
)
LONGEST_SECONDS = 600  # of the tests of one line: without its check, a protocol may wait for ever


class ForkedTests:
    """The side that asks."""

    def __init__(self, server: Popen[str]) -> None:
        self._server = server

    def run(self, tree: Path, *arguments: str) -> CompletedProcess[str]:
        """What `pytest ARGUMENTS` does in the folder `tree`; standard error is in the output, too."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([str(tree), *arguments]), file=self._server.stdin, flush=True)
        exit_code, output = json.loads(self._server.stdout.readline())
        return CompletedProcess(arguments, exit_code, output)


@contextmanager
def forked_tests() -> Iterator[ForkedTests]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: each for name, each in environment.items() if not name.startswith("PYTEST_")}
    with Popen([sys.executable, __file__], env=environment, stdin=PIPE, stdout=PIPE, text=True) as server:
        yield ForkedTests(server)


def serve() -> None:
    sys.path.pop(0)  # this file's folder
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    for line in sys.stdin:
        tree, *arguments = json.loads(line)
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = os.fork()
            if process == 0:
                _run(tree, arguments, output.fileno())
            exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            output.seek(0)
            print(json.dumps([exit_code, output.read()]), flush=True)


def _run(tree: str, arguments: list[str], output: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for stream, ours in enumerate((nowhere, output, output)):
        os.dup2(ours, stream)
    signal.alarm(LONGEST_SECONDS)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree  # for the programs that tests start
    sys.path.insert(0, tree)
    exit_code = 3  # pytest's for an error of its own
    try:
        import pytest

        exit_code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    serve()
