"""Amalgram from Python: what `amalgram simulate` and `amalgram report` do, for scripts and notebooks.

    import amalgram

    merged = amalgram.simulate("my-consortium")
    merged.model                                            # a Hugging Face folder
    merged.report.evaluation.mean["regmean"].accuracy

Nothing is printed. Progress and warnings go to the logger "amalgram".
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from deploy.simulation.engine import Engine
    from server.report.report import Report

__all__ = ["Merged", "main", "report", "simulate"]
logging.getLogger("amalgram").addHandler(logging.NullHandler())  # whoever sets logging up sees what we log
# Torch's threads wait asleep. Otherwise they spin, and on a busy machine they take the cores from each other: ten times
# as long and more (benchmarks/threads.py). Torch reads these when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# Torch takes memory for large tensors in pages of 2 MB if the kernel allows it: each page costs time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> NoReturn:
    """The command `amalgram`."""
    shadowed = _shadowed_package()
    if shadowed:
        hint = "give Amalgram a virtual environment of its own, without PYTHONPATH"
        print(f"error: {shadowed}\nhint: {hint}", file=sys.stderr)
        sys.exit(2)
    from deploy.cli import main as run

    run()


def _shadowed_package() -> str:
    """Which of our packages is another one of the same name, in words; empty if none is.

    They have names that others use, too: with another `common` first on the path, nothing of ours could be imported.
    """
    here = Path(__file__).resolve().parent
    for name in ("common", "client", "server", "deploy"):
        found = find_spec(name)
        places = [] if found is None else [Path(each).resolve() for each in found.submodule_search_locations or ()]
        if here / name not in places:
            is_there = f"is {places[0]}, not Amalgram's" if places else "is missing"
            return f"the package {name!r} {is_there}"
    return ""


@dataclass(frozen=True)
class Merged:
    """A merge that is over: its report, and where its files are."""

    report: Report
    output: Path

    @property
    def model(self) -> Path:
        """The merged model: a Hugging Face folder, or a LoRA adapter if the agreement says so."""
        return self.output / "model"

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.output / "report.html"


def simulate(
    folder: Path | str,
    output: Path | str | None = None,
    *,
    progress: bool = False,
    engine: Engine = "in-process",
    with_references: bool = True,
) -> Merged:
    """Merge the consortium in `folder`, which `amalgram simulate --init` writes a pattern of.

    `output`: a new folder, or an earlier output, whose result stays until there is a new one; left out,
    `folder/output`. `progress`: show one bar on standard error. `engine` and `with_references` are those of the
    command.

    Raises an AmalgramError (common/errors.py), within a second or two if settings or files are wrong. An interrupted
    run resumes when this is called again on the same folders.
    """
    _check_packages()
    from deploy.consortium import read_consortium
    from deploy.simulation.engine import check_engine

    check_engine(engine)
    consortium = read_consortium(Path(folder).resolve())
    output = Path(folder) / "output" if output is None else Path(output)
    from deploy.simulation.simulate import run_consortium  # torch takes seconds to import

    with _quiet_libraries(), _bar() if progress else nullcontext():
        made = run_consortium(consortium, output.resolve(), engine=engine, with_references=with_references)
    return Merged(report=made, output=output)


def report(output: Path | str) -> Merged:
    """What an earlier run wrote to its output folder. Raises SettingsError if it wrote no report."""
    _check_packages()
    from server.report.report import read_report

    return Merged(report=read_report(Path(output)), output=Path(output))


def _check_packages() -> None:
    if shadowed := _shadowed_package():
        raise ImportError(f"{shadowed}; give Amalgram an environment of its own")


@contextmanager
def _bar() -> Iterator[None]:
    from deploy.terminal import one_bar

    with one_bar():
        yield


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep transformers from warning and drawing bars, as the command does; afterwards it is as it was."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


if __name__ == "__main__":
    main()
