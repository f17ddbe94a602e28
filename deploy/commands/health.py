"""`amalgram health`: whether the coordinator's server answers, over TLS and with the certificate in its settings."""

import ssl
import urllib.request
from pathlib import Path

from common.errors import EngineError, SettingsError
from common.settings_file import load_settings
from deploy.terminal import answer
from server.settings import CoordinatorSettings

ANSWER_SECONDS = 10.0


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
    url = f"https://127.0.0.1:{network.listen.rpartition(':')[2]}/health"
    root = settings_file.resolve().parent / network.root_certificate
    if not root.is_file():
        raise SettingsError(f"{root}: no such file", hint="`amalgram keys certificate` makes it")
    try:
        trust = ssl.create_default_context(cafile=root)
        with urllib.request.urlopen(url, context=trust, timeout=ANSWER_SECONDS) as response:
            response.read()
    except OSError as error:  # urllib's errors are OSErrors
        raise EngineError(f"{url}: {getattr(error, 'reason', error)}", hint="is `amalgram server` running?") from None
    return url
