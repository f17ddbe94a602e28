"""How the tests are run: what is loaded, what begins first, what is said at the end. Fixtures are in tests/support."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start, too: see torch.set_num_threads in fixtures.py

from collections import Counter

import pytest

from tests.support.programs import NEEDS

# The files that take longest, begun first: then no worker is left with a long one when the other has nothing to do.
# A file's tests go to one worker, since they may share something dear, such as a server that is running.
BEGUN_FIRST = (
    "end_to_end/test_simulate.py",
    "test_docs.py",
    "end_to_end/test_deployment.py",
    "end_to_end/test_resume.py",
    "end_to_end/test_masked.py",
    "end_to_end/",
    "attacks/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((n for n, part in enumerate(BEGUN_FIRST) if part in item.nodeid), len(BEGUN_FIRST))
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run. The process that hands them out to workers need not import torch."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.support.fixtures")
    else:
        from tests.support.workers import fork_workers

        fork_workers()


def pytest_collection_finish() -> None:
    """Nothing that is loaded by now is thrown away; the garbage collector need not look through it in every test."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say, just before the last line, what was skipped for want of a program, and how to install it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.items():
        if reason.startswith(NEEDS):
            terminalreporter.write_line(f"skipped {count} test{'s' if count > 1 else ''}: {reason}", yellow=True)
