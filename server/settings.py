"""The coordinator's settings file: where the agreement and the base model are, where results go, where it listens."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.settings_file import Settings

Listen = Annotated[str, Field(pattern=r"^(0\.0\.0\.0|127\.0\.0\.1|\[::\]):[0-9]{1,5}$")]


class ServerNetwork(Settings):
    """Where `amalgram server` listens, and the files that `amalgram keys certificate` makes.

    `listen`: "0.0.0.0:PORT" or "[::]:PORT" for owners elsewhere, "127.0.0.1:PORT" for this machine alone. The
    coordinator's own programs come from this machine, too, so the certificate also names 127.0.0.1.
    """

    listen: Listen
    certificate: Path = Path("server.pem")
    key: Path = Path("server.key")
    root_certificate: Path = Path("ca.pem")
    state: Path = Path("server-state")


class CoordinatorSettings(Settings):
    """`coordinator.toml`. Paths are relative to the file."""

    agreement: Path
    output: Path
    identity: Path = Path("coordinator.key")
    # The coordinator's copy of the base model, where it is not what the agreement names.
    base: str | None = None
    # What `amalgram server` and `amalgram merge` need; a simulation does without.
    network: ServerNetwork | None = None
