"""Runs a document: compares console blocks with what their commands print, and executes python blocks.

In a console block, `$ ` begins a command, `> ` continues it, and a line `...` stands for any number of lines. Times,
fingerprints and digests change from run to run, so they are replaced on both sides; a fingerprint in a command becomes
the last one that was printed. Numbers with three digits after
the point may differ by TOLERANCE, because another processor rounds differently. A toml block whose first line is
`# FOLDER/NAME.toml` is written to that file.
"""

import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deploy.cli import main

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.05
DECIMAL = re.compile(r"\b\d\.\d{3}\b")
FINGERPRINT = re.compile(r"\b(\d{5} ){7}\d{5}\b")
VARYING = (
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "TIME"),
    (FINGERPRINT, "FINGERPRINT"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "DIGEST"),
)


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def run_document(document: Path) -> None:
    """Run all blocks in the current folder. Raises AssertionError if the document is not true."""
    names: dict[str, Any] = {}
    last_fingerprint = ""
    for language, text in blocks(document):
        if language == "python":
            exec(compile(text, str(document), "exec"), names)
        elif language == "toml" and (path := re.match(r"# (\S+/\S+\.toml)\n", text)):
            Path(path[1]).parent.mkdir(exist_ok=True)
            Path(path[1]).write_text(text)
        elif language == "console":
            for command, expected in _commands(text):
                printed = run_command(FINGERPRINT.sub(last_fingerprint, command))
                last_fingerprint = next((found[0] for found in FINGERPRINT.finditer(printed)), last_fingerprint)
                assert _matches(expected, _lines(printed)), f"{document.name}: $ {command}\n{printed}"


def run_command(command: str) -> str:
    """What a command prints to both streams. `amalgram` and our own scripts run in this process, to save time."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "cd":
        os.chdir(*arguments)
        return ""
    if program == "amalgram":
        return _in_this_process(["amalgram", *arguments])
    if program == "python":
        return _in_this_process([str(ROOT / arguments[0]), *arguments[1:]])
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _in_this_process(arguments: list[str]) -> str:
    printed = io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    exit_code: Any = 0
    with redirect_stdout(printed), redirect_stderr(printed), patch.object(sys, "argv", arguments):
        try:
            if arguments[0] == "amalgram":
                main()
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            exit_code = end.code
        finally:
            signal.signal(signal.SIGTERM, terminate)
    assert not exit_code, f"{exit_code}: {printed.getvalue()}"
    return printed.getvalue().replace(f"{Path.cwd()}/", "")


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *printed = re.sub(r"\\\n> +", "", part).split("\n")
        yield command, _lines("\n".join(printed))


def _lines(printed: str) -> list[str]:
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    for pattern, word in VARYING:
        lines = [pattern.sub(word, line) for line in lines]
    return lines


def _matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether `printed` matches `expected`."""
    if not expected:
        return not printed
    if expected[0] == "...":
        return any(_matches(expected[1:], printed[start:]) for start in range(len(printed) + 1))
    return bool(printed) and _alike(expected[0], printed[0]) and _matches(expected[1:], printed[1:])


def _alike(expected: str, printed: str) -> bool:
    pairs = zip(DECIMAL.findall(expected), DECIMAL.findall(printed), strict=False)
    close = all(abs(float(one) - float(other)) <= TOLERANCE for one, other in pairs)
    return close and DECIMAL.sub("DECIMAL", expected) == DECIMAL.sub("DECIMAL", printed)
