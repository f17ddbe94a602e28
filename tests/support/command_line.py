"""The parser of `amalgram`, for tests of what documents and help texts say."""

from collections.abc import Iterator

import click

from deploy.cli import parser


def parse(arguments: list[str]) -> None:
    """Raise click's UsageError unless `amalgram ARGUMENTS` is a command with options and arguments that exist."""
    command: click.Command = parser()
    context = click.Context(command, info_name="amalgram")
    while isinstance(command, click.Group):
        if not arguments or arguments == ["--help"]:
            return
        if arguments[0].startswith("-"):  # an option of the group is looked up, not tried: it would act
            assert arguments[0] in {name for parameter in command.params for name in parameter.opts}, arguments
            return
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command, context = found, click.Context(found, parent=context)
    if arguments != ["--help"]:
        command.make_context(command.name, arguments, parent=context)


def parsers() -> Iterator[tuple[str, click.Command]]:
    """Every command and group, with the words that call it."""
    waiting: list[tuple[str, click.Command]] = [("amalgram", parser())]
    while waiting:
        words, command = waiting.pop()
        yield words, command
        if isinstance(command, click.Group):
            waiting += [(f"{words} {name}", each) for name, each in command.commands.items()]
