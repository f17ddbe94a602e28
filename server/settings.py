"""The coordinator's settings file: where it finds the agreement and the base, where it writes, where it listens."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.settings_file import Settings, matching

LISTEN_FORM = "0.0.0.0:PORT, [::]:PORT or 127.0.0.1:PORT"
Listen = Annotated[str, matching(r"(0\.0\.0\.0|127\.0\.0\.1|\[::\]):[0-9]{1,5}", LISTEN_FORM)]


class ServerNetwork(Settings):
    """Where `amalgram server` listens, and the files that `amalgram keys certificate` makes.

    `listen`: "0.0.0.0:PORT" or "[::]:PORT" for owners elsewhere, "127.0.0.1:PORT" for this machine alone. The
    coordinator's own programs connect from this machine, so the certificate also names 127.0.0.1.
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
    # The coordinator's copy of the base model, if it is not where the agreement says.
    base: str | None = None
    # How many threads compute at `amalgram server`. Left out, as many as this machine has cores.
    threads: Annotated[int, Field(ge=1)] | None = None
    # `amalgram server` and `amalgram merge` need it; a simulation does not.
    network: ServerNetwork | None = None
