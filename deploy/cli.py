"""The command `amalgram`: its arguments and help. What a command does is in `deploy/commands/`.

Each command imports its module when it is called, so that help, keys and the like do not wait for PyTorch.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer
from typer.core import TyperArgument
from typer.utils import get_params_from_function

from common.errors import unreadable
from deploy.commands.errors import run_command, run_until_stopped
from deploy.terminal import set_up_output

cli = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command: a subcommand inherits them
)
keys = typer.Typer(no_args_is_help=True)
cli.add_typer(keys, name="keys")

FIRST_STEPS = """\
amalgram simulate                        see it work: five owners, one merged model, two minutes
amalgram simulate --init my-consortium   write a small, commented example with three owners
amalgram simulate my-consortium          merge it; then put your own models and files in
amalgram check my-consortium             look at all of them in seconds, before anything is computed
amalgram --help                          all commands; each has an example: amalgram simulate --help"""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text; log lines become JSON too.")]
OwnerFile = Annotated[Path, typer.Argument(metavar="OWNER.toml", help="This owner's settings.")]
CoordinatorFile = Annotated[Path, typer.Argument(metavar="COORDINATOR.toml", help="The coordinator's settings.")]


class EngineName(StrEnum):
    in_process = "in-process"
    network = "network"
    ray = "ray"


def main() -> NoReturn:
    """Entry point of `amalgram`."""
    # typer's standalone mode would report errors its own way; `run_command` reports ours.
    run_command(lambda: parser()(prog_name="amalgram", standalone_mode=False))


def parser() -> click.Command:
    """The command with its subcommands, each of which shows the help of its arguments."""
    whole = typer.main.get_command(cli)
    _describe_arguments(whole)
    return whole


def _describe_arguments(command: click.Command) -> None:
    """Since click 8.5, arguments have a help of their own, which overwrites the one of typer 0.20 with None."""
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        _describe_arguments(each)
    described = get_params_from_function(command.callback) if command.callback else {}
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and parameter.name:
            parameter.help = described[parameter.name].default.help


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"amalgram {version('amalgram')}")
        raise typer.Exit


@cli.callback(invoke_without_command=True)
def about(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One merged model from organisations that must not share data or models.

    Example: amalgram simulate
    """
    if context.invoked_subcommand is None:
        print(FIRST_STEPS)


@cli.command()
def simulate(
    folder: Annotated[Path | None, typer.Argument(help="A consortium: agreement.toml and one file per owner.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to FOLDER instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the model and the report go.")] = None,
    engine: Annotated[
        EngineName, typer.Option(help="network: a server and a client per owner, over TLS.")
    ] = EngineName.in_process,
    references: Annotated[bool, typer.Option(help="Also compute references that need everything in one place.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For the demo; an agreement has its own.")] = 0,
    as_json: Json = False,
) -> None:
    """Run all parties of a merge on this machine. Without FOLDER, run the demo: five owners with handwritten digits.

    Example: amalgram simulate --init reviews && amalgram simulate reviews
    """
    set_up_output(as_json)
    from deploy.commands.simulate import simulate_demo, simulate_folder, write_example

    if init:
        write_example(folder)
    elif folder is None:
        simulate_demo(out, seed, engine.value, references)
    else:
        simulate_folder(folder, out, engine.value, references)


@keys.callback()
def about_keys() -> None:
    """Make and show a party's keys; make the server's certificate.

    Example: amalgram keys new hotel
    """


@keys.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="The party's name: an owner's, or `coordinator`.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a party's keys. NAME.key and an owner's NAME.node are secret; NAME.pub goes into the agreement.

    Example: amalgram keys new hotel
    """
    set_up_output(as_json)
    from deploy.commands.keys import make_keys

    make_keys(name, folder)


@keys.command("certificate")
def keys_certificate(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="Names or addresses that owners connect to.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a TLS certificate for the coordinator's server, if nobody else issues you one.

    If the folder holds ca.key and ca.pem, they sign the new certificate, and the owners keep their ca.pem.

    Example: amalgram keys certificate merge.example.org
    """
    set_up_output(as_json)
    from deploy.commands.keys import make_certificate

    make_certificate(hosts, folder)


@keys.command("show")
def keys_show(path: Annotated[Path, typer.Argument(help="A .pub, .key or .pem file.")], as_json: Json = False) -> None:
    """Show the fingerprint of an identity or a certificate. Compare it by phone with the party it belongs to.

    Example: amalgram keys show hotel.pub
    """
    set_up_output(as_json)
    from deploy.commands.keys import show_fingerprint

    show_fingerprint(path)


@cli.command()
def check(
    path: Annotated[
        Path, typer.Argument(help="A consortium's folder, an agreement or its draft, OWNER.toml or COORDINATOR.toml.")
    ],
    as_json: Json = False,
) -> int:
    """Check settings, keys, models and files, and say what a merge would do. Exit code 0: ready; 1: not.

    Example: amalgram check reviews
    """
    set_up_output(as_json)
    from deploy.commands.check import check_and_show

    return check_and_show(path)


@cli.command()
def draft(
    short: Annotated[Path, typer.Argument(help="The file that people write: see `amalgram simulate --init`.")],
    public: Annotated[list[Path], typer.Argument(help="The .pub file of every owner and of the coordinator.")],
    out: Annotated[Path, typer.Option(help="The agreement that all parties then hold.")] = Path("agreement.toml"),
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The server's address: also write an invitation for the owners."),
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="An owner's LoRA adapter: merge only what it changes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Complete a short file into an agreement: add keys, base model, merge plan, bounds and thresholds.

    Example: amalgram draft short.toml *.pub --address merge.example.org:9443
    """
    set_up_output(as_json)
    from deploy.commands.draft import draft_agreement

    draft_agreement(short, public, out, address, adapter or [])


@cli.command()
def join(
    invitation: Annotated[Path, typer.Argument(help="The file that the drafter sent: see `amalgram draft --address`.")],
    owner: Annotated[str | None, typer.Option(help="Whose keys to use, if this folder has several owners'.")] = None,
    model: Annotated[str | None, typer.Option(help="The fine-tuned model; if left out, one is made here.")] = None,
    train: Annotated[Path | None, typer.Option(help="The training rows.")] = None,
    test: Annotated[Path | None, typer.Option(help="The test rows.")] = None,
    as_json: Json = False,
) -> None:
    """Write an owner's settings from an invitation, beside its keys. Nothing leaves before `amalgram agree`.

    Example: amalgram join invitation.toml --model model --train train.jsonl --test test.jsonl
    """
    set_up_output(as_json)
    from deploy.commands.join import join as join_owner

    join_owner(invitation, owner, model, train, test)


@cli.command()
def agree(
    owner_file: OwnerFile,
    yes: Annotated[
        str | None,
        typer.Option(metavar="FINGERPRINT", help="Consent without being asked, if the agreement has this fingerprint."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Consent although the same rows or model were contributed before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what would leave this machine, who could read it and what it reveals; then ask for consent.

    Example: amalgram agree hotel.toml
    """
    set_up_output(as_json)
    _check_readable(owner_file)
    from deploy.commands.agree import ask_for_consent

    ask_for_consent(owner_file, yes, again)


@cli.command()
def audit(
    owner_file: OwnerFile,
    model: Annotated[
        Path | None,
        typer.Argument(help="Any Hugging Face model or adapter, or the output of a run. Left out: only yours."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What MODEL was made from, if that is not the agreed base."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where audit.html and audit.json go.")] = Path("audit"),
    candidates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, some of them yours: how many would an attacker pick?")
    ] = None,
    rows: Annotated[int, typer.Option(min=10, help="How many training rows to compare with as many others.")] = 1000,
    as_json: Json = False,
) -> None:
    """Attack a model as anyone who has it could, and say what it gives away about your rows. Nothing is sent.

    Example: amalgram audit hotel.toml output
    """
    set_up_output(as_json)
    _check_readable(owner_file)
    from deploy.commands.audit import audit_and_show

    audit_and_show(owner_file, model, base, candidates, out, rows)


@cli.command()
def personal(
    owner_file: OwnerFile,
    model: Annotated[Path, typer.Argument(help="The published model, or the output folder of its run.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the personal model.")],
    as_json: Json = False,
) -> None:
    """Make a model for this owner alone, from the published one and its own, and say what it gains. Nothing is sent.

    Example: amalgram personal hotel.toml output personal
    """
    set_up_output(as_json)
    _check_readable(owner_file)
    from deploy.commands.personal import make_and_show

    make_and_show(owner_file, model, out)


@cli.command()
def client(owner_file: OwnerFile, as_json: Json = False) -> None:
    """Run an owner's node until stopped: connect to the coordinator and run only the bundle that the owner agreed to.

    Example: amalgram client hotel.toml
    """
    set_up_output(as_json)
    _check_readable(owner_file)
    from deploy.commands.client import run_client

    run_until_stopped(lambda: run_client(owner_file))


@cli.command()
def server(coordinator_file: CoordinatorFile, as_json: Json = False) -> None:
    """Run the coordinator's server until stopped: it lets in the agreement's owners and nobody else.

    Example: amalgram server coordinator.toml
    """
    set_up_output(as_json)
    _check_readable(coordinator_file)
    from deploy.commands.server import run_server

    run_until_stopped(lambda: run_server(coordinator_file))


@cli.command()
def health(coordinator_file: CoordinatorFile, as_json: Json = False) -> None:
    """Ask whether this machine's server is healthy. Exit code 0: it answers as it should; 1: not.

    Example: amalgram health coordinator.toml
    """
    set_up_output(as_json)
    _check_readable(coordinator_file)
    from deploy.commands.health import show_health

    show_health(coordinator_file)


@cli.command()
def merge(coordinator_file: CoordinatorFile, as_json: Json = False) -> None:
    """Merge on the running `amalgram server`: wait for the owners, show each step, write the model and the report.

    Example: amalgram merge coordinator.toml
    """
    set_up_output(as_json)
    _check_readable(coordinator_file)
    from deploy.commands.merge import merge_and_show

    merge_and_show(coordinator_file)


@cli.command()
def verify(
    out: Annotated[
        Path,
        typer.Argument(
            help="The output folder of a run, or of a published model; or OWNER.toml, for its records of wrong models; "
            "or a file of OUT/evidence."
        ),
    ],
    receipts: Annotated[Path | None, typer.Option(help="One of an owner's state/receipts to check against.")] = None,
    as_json: Json = False,
) -> int:
    """Check a published model against the signatures of its owners. Exit code 0: all as signed; 1: not.

    With OWNER.toml: explain what this owner kept of models that are not the merge, under all agreements, and verify who
    signed it. It reads only, and needs no key. Exit code 6: it kept something.

    With a file of OUT/evidence: say which owner lied in a sum. Exit code 0: the file proves it.

    Example: amalgram verify demo-output
    """
    set_up_output(as_json)
    from deploy.commands.explain import explain_evidence
    from deploy.commands.verify import explain_lie, verify_folder

    if out.suffix == ".json" and out.is_file():
        return explain_lie(out)
    if out.suffix == ".toml" and out.is_file():
        return explain_evidence(out)
    return verify_folder(out, receipts)


@cli.command()
def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run, or the consortium's folder.")],
    as_json: Json = False,
) -> None:
    """Show a run's table again and render its report.html anew.

    Example: amalgram report demo-output
    """
    set_up_output(as_json)
    from deploy.commands.report import report_again

    report_again(out)


def _check_readable(path: Path) -> None:
    """Refuse a settings file that is not there, in the words of whoever would read it, and without their libraries."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from None
