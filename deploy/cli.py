"""The command `amalgram`."""

import errno
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape

from common.errors import AmalgramError, ConsentError, SettingsError
from deploy.terminal import messages, progress_below_log, show_log, shows_json

if TYPE_CHECKING:
    from server.report.report import Report

cli = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")
keys = typer.Typer(no_args_is_help=True)
cli.add_typer(keys, name="keys")
console = Console()

INTERRUPTED, TERMINATED = 130, 143
FIRST_STEPS = """\
amalgram simulate                        see it work: five owners, one merged model, about a minute
amalgram simulate --init my-consortium   write a small, commented example with three owners
amalgram simulate my-consortium          merge it; then put your own models and files in
amalgram --help                          all commands; each has an example: amalgram simulate --help"""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text; log lines are JSON too.")]
log = logging.getLogger("amalgram")


class EngineName(StrEnum):
    in_process = "in-process"
    ray = "ray"


@cli.callback(invoke_without_command=True)
def about(context: typer.Context) -> None:
    """One merged model from organisations that must not share data or models.

    Example: amalgram simulate
    """
    if context.invoked_subcommand is None:
        print(FIRST_STEPS)


@keys.callback()
def about_keys() -> None:
    """Make and show a party's keys; make the server's certificate.

    Example: amalgram keys new hotel
    """


@cli.command()
def simulate(
    folder: Annotated[Path | None, typer.Argument(help="A consortium: agreement.toml and one file per owner.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to FOLDER instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where model and report go.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Who carries the messages.")] = EngineName.in_process,
    references: Annotated[bool, typer.Option(help="Also compute what needs everything in one place.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the demo; a folder's is in its agreement.")] = 0,
    as_json: Json = False,
) -> None:
    """Run all parties of a merge on this machine. Without FOLDER: the demo, five owners with handwritten digits.

    Example: amalgram simulate --init reviews && amalgram simulate reviews
    """
    show_log(as_json)
    _quiet_libraries()
    if init:
        if folder is None:
            raise SettingsError("--init needs a FOLDER to write the example to: amalgram simulate --init FOLDER")
        from deploy.example.reviews import write_consortium as write_example

        write_example(folder)
        hint = f"wrote an example of three owners to {folder}; run it: amalgram simulate {folder}"
        _answer({"folder": str(folder)}, as_json, hint=hint)
        return
    from deploy.demo.run import run_demo
    from deploy.simulation.simulate import simulate as run_simulation

    if folder is None:
        if Path("agreement.toml").is_file():
            raise SettingsError("this folder holds a consortium; to run it: amalgram simulate .")
        out = out or Path("demo-output")
        log.info("no FOLDER given: the demo, into %s", out)
        with progress_below_log():
            report = run_demo(out, seed, engine=engine.value, with_references=references)
    else:
        out = out or folder / "output"
        with progress_below_log():
            report = run_simulation(folder, out, engine=engine.value, with_references=references)
    _show(report, out, as_json)


@keys.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="The party's name: an owner's, or `coordinator`.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a party's keys: NAME.key and, for an owner, NAME.node, which stay here; NAME.pub is for the agreement.

    Example: amalgram keys new hotel
    """
    show_log(as_json)
    from pydantic import TypeAdapter, ValidationError

    from common.agreement import COORDINATOR
    from common.identity import Identity, write_identity
    from common.settings_file import Name
    from deploy.commands.keys import write_node_key

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise SettingsError(
            f"{name!r} is no name: lower-case letters, digits, - and _, at most 32, beginning with a letter or digit"
        ) from None
    path = folder / f"{name}.key"
    if path.exists():
        raise SettingsError(f"{path}: is there already, and a key is never overwritten; name another folder")
    node_key = None if name == COORDINATOR else write_node_key(folder / f"{name}.node")
    write_identity(path, Identity(name=name, seed=secrets.token_bytes(32)), node_key)
    secrets_made = [str(path)] if node_key is None else [str(path), str(folder / f"{name}.node")]
    hint = (
        f"{' and '.join(secrets_made)} {'is' if node_key is None else 'are'} secret and here to stay. "
        f"Send {path.with_suffix('.pub')} to whoever drafts the agreement."
    )
    found = _identity(path.with_suffix(".pub"))
    _answer(found | {"public": str(path.with_suffix(".pub")), "secret": secrets_made}, as_json, _lines(found), hint)


@keys.command("certificate")
def keys_certificate(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="Names or addresses that owners connect to.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make what the coordinator's server needs for encrypted lines, where nobody else issues certificates.

    With ca.key and ca.pem in the folder, a new server certificate is made with them: the owners' ca.pem stays good.

    Example: amalgram keys certificate merge.example.org
    """
    show_log(as_json)
    from deploy.commands.keys import write_certificate

    written = [str(path) for path in write_certificate(folder, hosts)]
    hint = (
        f"Send {folder / 'ca.pem'} to every owner, by a way that they trust. server.key stays with the server; ca.key "
        "is needed for the next certificate only: keep it elsewhere, for whoever has it can pass for the server."
    )
    _answer({"written": written}, as_json, "\n".join(written), hint)


@keys.command("show")
def keys_show(path: Annotated[Path, typer.Argument(help="A .pub, .key or .pem file.")], as_json: Json = False) -> None:
    """Show the fingerprint of an identity, or of a certificate. Compare it by phone with the party it belongs to.

    Example: amalgram keys show hotel.pub
    """
    show_log(as_json)
    found = _certificate(path) if path.suffix == ".pem" else _identity(path)
    _answer(found, as_json, _lines(found))


def _certificate(path: Path) -> dict[str, str]:
    from cryptography.hazmat.primitives.serialization import Encoding

    from common.identity import fingerprint
    from deploy.commands.keys import read_certificate

    certificate = read_certificate(path)
    return {
        "certificate": certificate.subject.rfc4514_string(),
        "valid_until": f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        "fingerprint": fingerprint(certificate.public_bytes(Encoding.DER)),
    }


def _identity(path: Path) -> dict[str, str]:
    from common.identity import fingerprint, read_identity, read_public_identity

    if path.suffix == ".pub":
        public = read_public_identity(path)
        name, public_key = public.name, public.public_key
    else:
        identity = read_identity(path)
        name, public_key = identity.name, identity.public_key
    return {"name": name, "public_key": public_key.hex(), "fingerprint": fingerprint(public_key)}


def _lines(found: dict[str, str]) -> str:
    return "\n".join(f"{name.replace('_', ' '):<12} {value}" for name, value in found.items())


@cli.command()
def draft(
    short: Annotated[Path, typer.Argument(help="What people write: see `amalgram simulate --init`.")],
    public: Annotated[list[Path], typer.Argument(help="Everybody's .pub file, the coordinator's among them.")],
    out: Annotated[Path, typer.Option(help="The agreement that all parties then hold.")] = Path("agreement.toml"),
    as_json: Json = False,
) -> None:
    """Complete a short file to an agreement: keys, base model, role of every tensor, bounds, thresholds.

    Example: amalgram draft short.toml hotel.pub cinema.pub phones.pub coordinator.pub
    """
    show_log(as_json)
    _quiet_libraries()
    from common.agreement import AgreementDraft
    from common.identity import fingerprint, read_public_identity
    from common.models.folders import model_folder
    from common.settings_file import load_settings
    from deploy.complete import complete_agreement
    from deploy.simulation.simulate import write_settings

    if out.exists():
        raise SettingsError(f"{out}: is there already; name another file with --out")
    written = load_settings(short, AgreementDraft)
    identities = {each.name: each for each in map(read_public_identity, public)}
    if len(identities) != len(public):
        raise SettingsError("two of the .pub files are of one name")
    agreement = complete_agreement(
        written,
        model_folder(written.base, short.resolve().parent),
        {name: each.public_key for name, each in identities.items()},
        {name: each.node_key for name, each in identities.items() if each.node_key is not None},
    )
    write_settings(out, agreement)
    found = {"agreement": str(out), "fingerprint": fingerprint(bytes.fromhex(agreement.digest()))}
    hint = "give this file to every party; each owner reads it and consents: amalgram agree OWNER.toml"
    _answer(found | {"digest": agreement.digest()}, as_json, _lines(found), hint)


@cli.command()
def agree(
    owner_file: Annotated[Path, typer.Argument(metavar="OWNER.toml", help="This owner's settings.")],
    yes: Annotated[bool, typer.Option("--yes", help="Consent without being asked, as scripts do.")] = False,
    as_json: Json = False,
) -> None:
    """Show what would leave this machine, who could read it and what it reveals; then ask for consent.

    Example: amalgram agree hotel.toml
    """
    show_log(as_json)
    _quiet_libraries()
    from client.owner import Owner
    from deploy.commands.agree import consent_text, give_consent

    owner = Owner(owner_file)
    text = consent_text(owner)
    print(text, file=sys.stderr if as_json else sys.stdout)  # to be read before it is asked
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("consent is asked for at a terminal; in a script, --yes gives it")
        if not typer.confirm(f"Does {owner.name} consent?", err=as_json):
            raise ConsentError("no consent was given, so nothing will leave")
    give_consent(owner)
    stored = owner.state.folder / "consent.json"
    found = {"owner": owner.name, "digest": owner.agreement.digest(), "read": text, "stored": str(stored)}
    _answer(found, as_json, hint=f"consent stored in {stored}")


@cli.command()
def client(
    owner_file: Annotated[Path, typer.Argument(metavar="OWNER.toml", help="This owner's settings.")],
    as_json: Json = False,
) -> None:
    """Be an owner's node: connect to the coordinator, run the consented bundle and no other, until stopped.

    Example: amalgram client hotel.toml
    """
    show_log(as_json)
    _quiet_libraries()
    from deploy.commands.client import find_node, run_client

    node = find_node(owner_file)
    found = {"address": node.address, "state": str(node.state), "bundle_digest": node.bundle_digest}
    _answer(found, as_json)
    _until_stopped(lambda: run_client(node))


@cli.command()
def server(
    coordinator_file: Annotated[Path, typer.Argument(metavar="COORDINATOR.toml", help="The coordinator's settings.")],
    as_json: Json = False,
) -> None:
    """Be the coordinator's server: let the agreement's owners in and nobody else, until stopped.

    Example: amalgram server coordinator.toml
    """
    show_log(as_json)
    _quiet_libraries()
    from deploy.commands.server import find_place, serve

    place = find_place(coordinator_file)
    host, port = place.host_and_port
    found = {"host": host, "port": port, "owners": place.agreement.owner_names, "state": str(place.state)}
    _answer(found, as_json)
    _until_stopped(lambda: serve(place))


@cli.command()
def health(
    coordinator_file: Annotated[Path, typer.Argument(metavar="COORDINATOR.toml", help="The coordinator's settings.")],
    as_json: Json = False,
) -> None:
    """Ask the server of this machine whether it is there: exit code 0 if it answers as it should, 1 if not.

    Example: amalgram health coordinator.toml
    """
    show_log(as_json)
    from deploy.commands.health import check_health

    url = check_health(coordinator_file)
    _answer({"healthy": url}, as_json, f"healthy: {url}")


@cli.command("merge")
def merge_command(
    coordinator_file: Annotated[Path, typer.Argument(metavar="COORDINATOR.toml", help="The coordinator's settings.")],
    as_json: Json = False,
) -> None:
    """Merge, on the server that `amalgram server` runs: wait for the owners, show each step, write model and report.

    Example: amalgram merge coordinator.toml
    """
    show_log(as_json)
    _quiet_libraries()
    from deploy.commands.merge import merge
    from server.report.report import read_report

    with progress_below_log():
        output = merge(coordinator_file)
    _show(read_report(output), output, as_json)


@cli.command()
def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run, or the consortium's.")],
    as_json: Json = False,
) -> None:
    """Show a run's table again, and make its report.html anew.

    Example: amalgram report demo-output
    """
    show_log(as_json)
    from server.report.page import render_report
    from server.report.report import read_report

    if not (out / "report.json").exists() and (out / "output" / "report.json").is_file():
        out = out / "output"  # the consortium's folder was named
    found = read_report(out)
    render_report(out)
    _show(found, out, as_json)


def main() -> None:
    """Entry point: one line per error, and an honest exit code."""
    signal.signal(signal.SIGTERM, _terminate)  # so that what was started is stopped
    try:
        # Not on its own: typer would turn every exception into one of its own.
        exit_code = cli(prog_name="amalgram", standalone_mode=False)
        if exit_code == INTERRUPTED:
            _fail("interrupted; nothing was published", INTERRUPTED, "run the same command again to resume")
        sys.exit(exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except AmalgramError as error:
        _fail(error.message, error.exit_code, error.hint)
    except OSError as error:
        hint = "free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", SettingsError.exit_code, hint)
    except Exception as error:
        if os.environ.get("AMALGRAM_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error}", AmalgramError.exit_code, "AMALGRAM_DEBUG=1 shows where")


def _until_stopped(run: Callable[[], None]) -> None:
    try:
        run()
    except KeyboardInterrupt:
        log.info("stopped")
        sys.exit(INTERRUPTED)


def _fail(message: str, exit_code: int, hint: str = "") -> None:
    message, hint = " ".join(message.split()), " ".join(hint.split())
    if shows_json():
        log.error("%s", message, extra={"about": {"exit_code": exit_code, "hint": hint}})
    else:
        messages.print("[red]error:[/]", escape(message), soft_wrap=True, highlight=False)
        if hint:
            messages.print("[yellow]hint:[/]", escape(hint), soft_wrap=True, highlight=False)
    sys.exit(exit_code)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _answer(found: dict[str, Any], as_json: bool, text: str = "", hint: str = "") -> None:
    """What a command has to say: one JSON object; or text on standard output, and a hint beside it."""
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
        return
    if text:
        print(text)
    if hint:
        messages.print(hint, soft_wrap=True, markup=False, highlight=False)


def _show(report: "Report", out: Path, as_json: bool) -> None:
    from deploy.commands.table import print_report

    if as_json:
        _answer(report.model_dump(mode="json"), as_json)
    else:
        print_report(console, report, out)


def _quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars off the screen; errors still come as exceptions."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
