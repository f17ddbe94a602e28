"""`amalgram health`: whether the coordinator's server answers, over TLS and with the certificate in its settings."""

from pathlib import Path

from common.errors import EngineError, SettingsError
from common.settings_file import load_settings
from deploy.reach import HEALTH, ask
from deploy.terminal import answer
from server.settings import CoordinatorSettings


def show_health(settings_file: Path) -> None:
    """Print where the server answers. Raises EngineError if it does not."""
    url = check_health(settings_file)
    answer({"healthy": url}, f"healthy: {url}")


def check_health(settings_file: Path) -> str:
    """The address at which the server answers. Raises EngineError unless it answers with its own certificate."""
    network = load_settings(settings_file, CoordinatorSettings).network
    if network is None:
        raise SettingsError(
            f"{settings_file}: has no [network] table, so this coordinator has no server",
            hint='add [network] with listen = "0.0.0.0:PORT"',
        )
    address = f"127.0.0.1:{network.listen.rpartition(':')[2]}"
    root = settings_file.resolve().parent / network.root_certificate
    if not root.is_file():
        raise SettingsError(f"{root}: no such file", hint="`amalgram keys certificate` makes it")
    try:
        status = ask(address, root, HEALTH)
    except EngineError as error:
        raise EngineError(error.message, hint="is `amalgram server` running?") from None
    if not 200 <= status < 300:
        raise EngineError(
            f"{address} answers with HTTP status {status}", hint="is it `amalgram server` that runs there?"
        )
    return f"https://{address}{HEALTH}"
