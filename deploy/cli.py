"""The command `amalgram`."""

import errno
import json
import logging
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from common.errors import AmalgramError, SettingsError

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
console = Console()
messages = Console(stderr=True)

INTERRUPTED, TERMINATED = 130, 143


class EngineName(StrEnum):
    in_process = "in-process"
    ray = "ray"


@cli.callback()
def about() -> None:
    """One merged model from organisations that must not share data or models."""


@cli.command()
def simulate(
    folder: Annotated[Path | None, typer.Argument(help="A consortium: agreement.toml and one file per owner.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to FOLDER instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where model and report go.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Who carries the messages.")] = EngineName.in_process,
    references: Annotated[bool, typer.Option(help="Also compute what needs everything in one place.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the demo; a folder's is in its agreement.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Run all parties of a merge on this machine. Without FOLDER: the demo, five owners with handwritten digits.

    Example: amalgram simulate --init reviews && amalgram simulate reviews
    """
    _quiet_libraries()
    if init:
        if folder is None:
            raise SettingsError("--init needs a FOLDER to write the example to: amalgram simulate --init FOLDER")
        from deploy.example.reviews import write_consortium as write_example

        write_example(folder)
        messages.print(
            f"wrote an example of three owners to {folder}; run it: amalgram simulate {folder}", markup=False
        )
        return
    from deploy.demo.run import run_demo
    from deploy.simulate import simulate as run_simulation

    _show_progress()
    if folder is None:
        if Path("agreement.toml").is_file():
            raise SettingsError("this folder holds a consortium; to run it: amalgram simulate .")
        out = out or Path("demo-output")
        messages.print(f"no FOLDER given: the demo, into {out}", markup=False)
        report = run_demo(out, seed, engine=engine.value, with_references=references)
    else:
        out = out or folder / "output"
        report = run_simulation(folder, out, engine=engine.value, with_references=references)
    _show(report, out, as_json)


@cli.command()
def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Show a run's table again, and make its report.html anew.

    Example: amalgram report demo-output
    """
    from server.report import read_report, render_report

    found = read_report(out)
    render_report(out)
    _show(found, out, as_json)


def main() -> None:
    """Entry point: one line per error, and an honest exit code."""
    signal.signal(signal.SIGTERM, _terminate)  # so that what was started is stopped
    try:
        exit_code = cli(standalone_mode=False)  # otherwise typer turns every exception into its own
        if exit_code == INTERRUPTED:
            _fail("interrupted; nothing was published. The same command begins again", INTERRUPTED)
        sys.exit(exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except AmalgramError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}{hint}", SettingsError.exit_code)
    except Exception as error:
        if os.environ.get("AMALGRAM_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error}. AMALGRAM_DEBUG=1 shows where", AmalgramError.exit_code)


def _fail(message: str, exit_code: int) -> None:
    messages.print("[red]error:[/]", escape(" ".join(message.split())), soft_wrap=True, highlight=False)
    sys.exit(exit_code)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _show(report: dict[str, Any], out: Path, as_json: bool) -> None:
    from deploy.table import print_report

    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_report(console, report, out)


def _show_progress() -> None:
    handler = RichHandler(console=messages, show_level=False, show_path=False, markup=False, log_time_format="%H:%M:%S")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("amalgram")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars off the screen; errors still come as exceptions."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
