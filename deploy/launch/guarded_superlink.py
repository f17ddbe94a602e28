"""A SuperLink that shows other machines the owners' interface, and nothing else.

Flower serves everything on one port, and its control interface knows no login: whoever reaches it can register keys and
start runs. Here whoever is not on this machine reaches `/v1/fleet/`, where every node proves its registered key, and
`/health`. Run as a process of its own: `python -m deploy.launch.guarded_superlink` and flower-superlink's arguments.

Local means: from a loopback address. A proxy on this machine would make everybody local; there must be none.
"""

import os
import re
import sys
from ipaddress import IPv6Address, ip_address
from typing import Any

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink import extensions
from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import EngineError
from deploy.launch.internals import check_internals

OPEN = re.compile(r"/health|/v1/fleet/[a-z-]+")  # what owners on other machines need


class Guard:
    """ASGI middleware, outermost: 403 for what another machine has no business with."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "lifespan"
            or is_local(scope.get("client"))  # check: guard-is-shut
            or is_open(scope["path"])
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("not from here\n", status_code=403)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a peer (address, port) is on this machine. Whoever has no readable address is not."""
    try:
        address = ip_address(client[0] if client else "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return OPEN.fullmatch(path) is not None  # check: open-paths-match-whole


def main() -> None:
    """Run flower-superlink with the guard in front."""
    check_internals()
    start_parent_process_monitor(os.getppid())
    create_app = superlink.create_app

    def create_guarded_app(*arguments: Any, **named: Any) -> Any:
        app = create_app(*arguments, **named)
        outermost: Any = app.user_middleware[0].cls
        if outermost is not Guard:
            raise EngineError("the guard is not the first to see a request; nothing was started")
        return app

    extensions.get_middleware = lambda: (Middleware(Guard),)
    superlink.create_app = create_guarded_app
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
