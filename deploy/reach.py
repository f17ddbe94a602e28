"""Whether a coordinator's server can be reached and is the right one; if not, the one cause, and what to do about it.

Flower's own client says why it cannot connect only after it has tried for a while, in the words of four libraries. So
the same library (httpx, with the same proxy settings and certificate) is asked first.
"""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from common.errors import EngineError, ServerAway
from common.lazy import lazy_module
from common.text import shown
from deploy.network_keys import names_in

if TYPE_CHECKING:
    import httpx
else:
    httpx = lazy_module("httpx")

ANSWER_SECONDS, LONGEST_SECONDS = 8.0, 15.0
MOST_MINUTES = 10  # that a server is waited for
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
HEALTH = "/health"  # what the SuperLink itself answers
OWNERS_DOOR = "/v1/fleet/pull-messages"  # what the guard answers, from wherever it is asked
NOT_A_NODE = 412  # the guard, to whoever proves no key (guarded_superlink.py)
WRONG_NAME, NOT_NOW = (62, 64), (9, 10)  # OpenSSL's X509_V_ERR_...: host, address; not yet valid, expired
log = logging.getLogger("amalgram.client")


def wait_until_reachable(address: str, root_certificate: Path) -> None:
    """Return once `check_reachable` does. Waits for a server that is away, as after a power cut, and says so once.

    Raises EngineError at once for anything else that is wrong, and after MOST_MINUTES if the server is still away.
    """
    deadline, pause = time.monotonic() + 60 * MOST_MINUTES, FIRST_PAUSE_SECONDS
    while True:
        try:
            return check_reachable(address, root_certificate)
        except ServerAway as error:
            if time.monotonic() + pause > deadline:
                raise
            if pause == FIRST_PAUSE_SECONDS:
                log.warning("%s; waiting up to %g minutes for it (%s)", error.message, MOST_MINUTES, error.hint)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def check_reachable(address: str, root_certificate: Path) -> None:
    """Return if an Amalgram server answers at HOST:PORT with a certificate that `root_certificate` vouches for.

    Otherwise raise EngineError, within LONGEST_SECONDS; ServerAway if it may come.
    """
    if ask(address, root_certificate, OWNERS_DOOR) != NOT_A_NODE:
        raise EngineError(
            f"what answers at {address} is not an Amalgram server",
            hint="ask the coordinator for the right port; a proxy must let the connection through as it is",
        )


def ask(address: str, root_certificate: Path, path: str) -> int:
    """The status that HOST:PORT answers with. Raises EngineError if it gives none, or does not prove who it is."""
    found: list[int | Exception] = []
    # A resolver may take half a minute to say that there is no such name, and has no time limit of its own.
    asking = threading.Thread(target=lambda: found.append(_ask(address, root_certificate, path)), daemon=True)
    asking.start()
    asking.join(LONGEST_SECONDS)
    answer = found[0] if found else httpx.ConnectTimeout("no answer")
    if isinstance(answer, Exception):
        raise _in_words(answer, address, root_certificate) from None
    return answer


def _ask(address: str, root_certificate: Path, path: str) -> int | Exception:
    try:
        trust = ssl.create_default_context(cafile=root_certificate)
        return httpx.get(f"https://{address}{path}", verify=trust, timeout=ANSWER_SECONDS).status_code
    except Exception as error:  # in a thread of its own: whoever waits for it raises it
        return error


def _in_words(error: Exception, address: str, root_certificate: Path) -> EngineError:
    host, port = address.rpartition(":")[::2]
    for cause in _causes(error):
        match cause:
            case httpx.ProxyError():
                return EngineError(
                    f"the proxy in this machine's environment does not connect to {address}: {shown(str(cause))}",
                    hint=f"have the proxy let {address} through, or add {host} to NO_PROXY",
                )
            case socket.gaierror() if cause.errno == socket.EAI_AGAIN:  # as before a machine has its network
                return ServerAway(
                    f"{host} cannot be looked up now",
                    hint="connect this machine to its network, or ask its administrator why no name server answers",
                )
            case socket.gaierror():
                return EngineError(
                    f"{host}: no such host is known here", hint="correct `address`, or ask your network's administrator"
                )
            case ssl.SSLCertVerificationError():
                return _untrusted(cause.verify_code, cause.verify_message, address, root_certificate)
            case ssl.SSLError():
                return EngineError(
                    f"what answers at {address} does not speak TLS ({shown(cause.reason or str(cause))})",
                    hint="ask the coordinator for the right port",
                )
            case ConnectionRefusedError():
                return ServerAway(
                    f"nothing listens at {address}",
                    hint="ask the coordinator whether `amalgram server` runs, and for its port",
                )
            case TimeoutError() | httpx.TimeoutException():
                return ServerAway(
                    f"{address} does not answer",
                    hint=f"a firewall may drop the connection: this machine needs a way out to {host}, TCP port {port}",
                )
            case OSError() if cause.strerror:
                return ServerAway(
                    f"{address} cannot be reached: {cause.strerror.lower()}",
                    hint=f"this machine needs a way out to {host}, TCP port {port}",
                )
    return EngineError(
        f"what answers at {address} ends the connection ({type(error).__name__})",
        hint="ask the coordinator for the right port; a proxy must let the connection through as it is",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """From the first cause to the error itself: a library's own words come after the system's."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    yield from reversed(chain)


def _untrusted(code: int, reason: str, address: str, root_certificate: Path) -> EngineError:
    host, port = address.rpartition(":")[::2]
    if code in WRONG_NAME:
        return EngineError(
            f"the certificate at {address} is for other names than {host}{_names_at(host, int(port))}",
            hint=f"use one of them as address, or have the coordinator make one: amalgram keys certificate {host}",
        )
    if code in NOT_NOW:
        return EngineError(
            f"the certificate at {address} is not valid now ({reason})",
            hint="set this machine's clock, or have the coordinator make a new one: amalgram keys certificate HOST",
        )
    return EngineError(
        f"{root_certificate} did not issue the certificate at {address} ({reason})",
        hint="get ca.pem from the coordinator again, and compare its fingerprint (amalgram keys show "
        f"{root_certificate}) by phone; if it is the right one, somebody is intercepting the connection",
    )


def _names_at(host: str, port: int) -> str:
    """What the certificate there is for, in words; empty if it does not say. Nobody vouches for it."""
    try:
        pem = ssl.get_server_certificate((host.strip("[]"), port), timeout=ANSWER_SECONDS)
        names = [str(name.value) for name in names_in(x509.load_pem_x509_certificate(pem.encode()))]
    except (OSError, ValueError):
        return ""
    return f": {shown(', '.join(names)[:200])}" if names else ""
