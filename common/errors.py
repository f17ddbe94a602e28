"""Every error that a person, a file or a peer can cause, in one tree.

    AmalgramError
    ├── SettingsError            a settings file says something that cannot be         exit 2
    ├── DataError                an owner's rows cannot be used                        exit 2
    ├── ModelError               a model cannot be used, or is not the agreed one      exit 2
    ├── ConsentError             what was asked for is not what was agreed             exit 3
    ├── ProtocolError
    │   ├── LocalProtocolError   we asked for a step that our state does not allow     exit 3
    │   └── RemoteProtocolError  a peer sent what the protocol does not allow          exit 3
    ├── TooFewOwners             fewer owners are left than the agreement demands      exit 4
    ├── NumericalError           a number that should be finite is not                 exit 5
    │   └── FalseTotal           a total that honest owners cannot make                exit 5
    ├── WrongModel               what the coordinator sent is not what was verified     exit 6
    ├── EngineError              the Flower engine did not do its part                 exit 1
    │   ├── ServerAway           nothing answers where the coordinator's server was    exit 1
    │   └── HelperEnded          a process that helped a simulation was killed         exit 1
    └── OwnerRefused             an owner answered with one of the codes above         that code's exit

An error has two parts. The message is one line: what is wrong, where, the value and the bound. The hint says what to do
about it. Only `code` ever crosses the wire, because an exception's text may quote a private row.
"""

from pathlib import Path

WHO_WRITES = {  # by the file's name, or its ending
    "agreement.toml": "`amalgram draft` writes the agreement, and `amalgram join` at an owner",
    "coordinator.toml": "`amalgram draft --address HOST:PORT` writes the coordinator's settings",
    "ca.pem": "`amalgram keys certificate HOST` makes it at the coordinator, and owners get it by `amalgram join`",
    ".toml": "`amalgram join` writes an owner's settings from an invitation",
    ".key": "`amalgram keys new NAME` makes it",
    ".node": "`amalgram keys new NAME` makes it",
    ".pub": "`amalgram keys new NAME` makes it",
    ".pem": "`amalgram keys certificate HOST` makes it",
}


class AmalgramError(Exception):
    """Base of all; `exit_code` is what the command ends with."""

    code = "unexpected"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class SettingsError(AmalgramError):
    code = "settings"
    exit_code = 2


class DataError(AmalgramError):
    code = "data"
    exit_code = 2


class ModelError(AmalgramError):
    code = "model"
    exit_code = 2


class ConsentError(AmalgramError):
    code = "consent"
    exit_code = 3


class ProtocolError(AmalgramError):
    code = "protocol"
    exit_code = 3


class LocalProtocolError(ProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    pass


class TooFewOwners(AmalgramError):  # noqa: N818 - the name is the sentence
    code = "too-few-owners"
    exit_code = 4


class NumericalError(AmalgramError):
    code = "numerical"
    exit_code = 5


class FalseTotal(NumericalError):  # noqa: N818 - the name says it
    pass


class WrongModel(AmalgramError):  # noqa: N818 - the name says it
    code = "wrong-model"
    exit_code = 6


class EngineError(AmalgramError):
    code = "engine"


class ServerAway(EngineError):  # noqa: N818 - the name says it
    pass


class HelperEnded(EngineError):  # noqa: N818 - the name says it
    pass


class RuleError(ValueError):
    """Raised inside a settings object, which turns it into a SettingsError; pydantic expects a ValueError there."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


EXIT_CODES: dict[str, int] = {
    kind.code: kind.exit_code
    for kind in (
        AmalgramError,
        SettingsError,
        DataError,
        ModelError,
        ConsentError,
        ProtocolError,
        TooFewOwners,
        NumericalError,
        WrongModel,
        EngineError,
    )
}


class OwnerRefused(AmalgramError):  # noqa: N818 - the name is the sentence
    """An owner answered with a refusal: the coordinator learns its code, never its text."""

    def __init__(self, owner: str, refusal_code: str) -> None:
        super().__init__(
            f"owner {owner} refused ({refusal_code})",
            hint="the reason stays on the owner's machine, in its log and error.txt",
        )
        self.owner = owner
        self.code = refusal_code
        self.exit_code = EXIT_CODES.get(refusal_code, AmalgramError.exit_code)


def unreadable(path: Path, error: OSError) -> SettingsError:
    """What to raise, and what to do, for a party's file that cannot be opened."""
    hint = "check the path, and that this user may read it"
    if isinstance(error, FileNotFoundError):
        made_by = WHO_WRITES.get(path.name) or WHO_WRITES.get(path.suffix)
        hint = f"check the path{f'; {made_by}' if made_by else ''}"
    return SettingsError(f"{path}: cannot be read ({error.strerror})", hint=hint)


def first_line(error: Exception) -> str:
    """What a library's exception says, cut to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
