"""The coordinator's settings file: where it finds the agreement and the base, where it writes, where it listens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from common.device import DeviceName
from common.errors import SettingsError
from common.identity import Identity, read_identity
from common.names import COORDINATOR
from common.settings_file import Settings, matching

if TYPE_CHECKING:
    from common.agreement import Agreement

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
    # The coordinator's copy of the pool on which models predict, if it is not beside the agreement.
    pool: Path | None = None
    # Where it solves, in float64: "cpu", "cuda" or "cuda:1"; "auto" is an accelerator if there is one.
    device: DeviceName = "cpu"
    # How many threads compute at `amalgram server`. Left out, as many as this machine has cores.
    threads: Annotated[int, Field(ge=1)] | None = None
    # `amalgram server` and `amalgram merge` need it; a simulation does not.
    network: ServerNetwork | None = None


def read_coordinator_identity(path: Path, agreement: "Agreement") -> Identity:
    """The coordinator's identity. Raises SettingsError unless it is the agreed one."""
    identity = read_identity(path)
    if identity.name != COORDINATOR or identity.public_key.hex() != agreement.coordinator.public_key:
        raise SettingsError(
            f"{path}: is not the identity that the agreement names for the coordinator",
            hint="name the right file as identity, or make a new agreement with this one's .pub file",
        )
    return identity
