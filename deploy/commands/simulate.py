"""`amalgram simulate`: runs all parties of a merge on this machine, or writes an example to run.

Each function imports what it needs: an example is written without the merge, and a folder is merged without the demo.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import SettingsError
from deploy.terminal import answer, progress_below_log
from server.output_folder import claim_output

if TYPE_CHECKING:
    from deploy.simulation.engine import Engine

DEMO_OUTPUT = Path("demo-output")
log = logging.getLogger("amalgram")


def write_example(folder: Path | None) -> None:
    """Write the commented example to `folder`. Raises SettingsError unless that is new or empty."""
    if folder is None:
        raise SettingsError("--init needs a FOLDER to write the example to", hint="amalgram simulate --init FOLDER")
    from deploy.example.reviews import write_consortium

    write_consortium(folder)
    hint = f"wrote an example of three owners to {folder}; run it: amalgram simulate {folder}"
    answer({"folder": str(folder)}, hint=hint)


def simulate_folder(folder: Path, out: Path | None, engine: Engine, references: bool) -> None:
    """Merge the consortium in `folder` and show its report."""
    from deploy.consortium import read_consortium
    from deploy.simulation.engine import check_engine

    check_engine(engine)
    consortium = read_consortium(folder.resolve())
    from deploy.commands.report import show_report
    from deploy.simulation.simulate import run_consortium  # torch: not before what people wrote is checked

    out = out or folder / "output"
    with progress_below_log():
        report = run_consortium(consortium, out.resolve(), engine=engine, with_references=references)
    show_report(report, out)


def simulate_demo(out: Path | None, seed: int, engine: Engine, references: bool) -> None:
    """Make the demo's consortium, merge it and show its report."""
    if Path("agreement.toml").is_file():
        raise SettingsError("no FOLDER given, but this folder holds a consortium", hint="amalgram simulate .")
    from deploy.simulation.engine import check_engine

    check_engine(engine)
    out = out or DEMO_OUTPUT
    claim_output(out)
    from deploy.commands.report import show_report
    from deploy.demo.run import run_demo

    log.info("no FOLDER given: running the demo, into %s", out)
    with progress_below_log():
        report = run_demo(out, seed, engine=engine, with_references=references)
    show_report(report, out)
