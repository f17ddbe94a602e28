"""How a command ends: an `error:` line, a `hint:` line if something can be done, and an exit code for scripts.

With --json both lines are one JSON object on standard error, with the fields `message`, `hint` and `exit_code`.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click

from common.errors import AmalgramError, SettingsError
from deploy.terminal import set_up_output, show_error, shows_json

INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells report it
log = logging.getLogger("amalgram")


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Run `command` and exit with its exit code, or report the error that it raised and exit with the error's."""
    signal.signal(signal.SIGTERM, _terminate)  # an exception, so that the command can stop what it started
    try:
        exit_code = command()
    except click.exceptions.NoArgsIsHelpError as help_text:
        help_text.show()
        sys.exit(help_text.exit_code)
    except click.UsageError as error:
        called = error.ctx.command_path if error.ctx else "amalgram"
        _fail(error.format_message(), error.exit_code, f"{called} --help lists the commands and options")
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except AmalgramError as error:
        _fail(error.message, error.exit_code, error.hint)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        _fail(f"{where}{error.strerror or error}", SettingsError.exit_code, hint)
    except Exception as error:
        if os.environ.get("AMALGRAM_DEBUG"):
            raise
        hint = "set AMALGRAM_DEBUG=1 and run the same command again to see where"
        _fail(f"unexpected {type(error).__name__}: {error}", AmalgramError.exit_code, hint)
    if exit_code == INTERRUPTED:
        _fail("interrupted; nothing was published", INTERRUPTED, "run the same command again to resume")
    sys.exit(exit_code)


def run_until_stopped(run: Callable[[], None]) -> None:
    """Run a command that has no end of its own; Ctrl-C stops it."""
    try:
        run()
    except KeyboardInterrupt:
        log.info("stopped")
        sys.exit(INTERRUPTED)


def _fail(message: str, exit_code: int, hint: str = "") -> NoReturn:
    message, hint = " ".join(message.split()), " ".join(hint.split())
    if "--json" in sys.argv[1:] and not shows_json():  # the command's options were not even read
        set_up_output(as_json=True)
    if shows_json():
        log.error("%s", message, extra={"about": {"exit_code": exit_code, "hint": hint}})
    else:
        show_error(message, hint)
    sys.exit(exit_code)


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)
