"""`amalgram health`: whether the coordinator's server answers, over TLS and with the certificate of its settings."""

import ssl
import urllib.request
from pathlib import Path

from common.errors import EngineError, SettingsError
from common.settings_file import load_settings
from server.settings import CoordinatorSettings

ANSWER_SECONDS = 10.0


def check_health(settings_file: Path) -> str:
    """Where the server answers. Raises EngineError if it does not, or not as it should."""
    network = load_settings(settings_file, CoordinatorSettings).network
    if network is None:
        raise SettingsError(f"{settings_file}: has no [network] table, so there is no server to ask")
    url = f"https://127.0.0.1:{network.listen.rpartition(':')[2]}/health"
    root = settings_file.resolve().parent / network.root_certificate
    if not root.is_file():
        raise SettingsError(f"{root}: is not there; `amalgram keys certificate` makes it")
    try:
        trust = ssl.create_default_context(cafile=root)
        with urllib.request.urlopen(url, context=trust, timeout=ANSWER_SECONDS) as answer:
            answer.read()
    except OSError as error:  # urllib's errors are among them
        raise EngineError(f"{url}: {getattr(error, 'reason', error)}; is `amalgram server` running?") from None
    return url
