"""A SuperLink that shows other machines the owners' interface, and nothing else.

Flower serves everything on one port, and its control interface knows no login: whoever reaches it can register keys and
start runs. Here whoever is not on this machine reaches `/v1/fleet/`, where every node proves its registered key, and
`/health`. Flower itself reads a request, however large, before it looks at that proof; here the proof comes first, and
a body has a limit. Run as a process of its own: `python -m deploy.launch.guarded_superlink` and flower-superlink's
arguments.

Local means: from a loopback address. A proxy on this machine would make everybody local; there must be none.
"""

import base64
import os
import re
import sys
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink import extensions
from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import EngineError
from deploy.launch.bounded_http import BOUNDS, is_local
from deploy.launch.internals import check_internals

OPEN = re.compile(r"/health|/v1/fleet/[a-z-]+")  # what owners on other machines need
FLEET = "/v1/fleet/"
MAX_BODY_BYTES = 16_000_000  # Flower's largest: a bundle of 10 MB, from this machine; a piece of 5 MB, from an owner

NOT_A_NODE = 412  # Flower's answer to a key that it does not know; on a 401, its node would end as if all were well


class Guard:
    """ASGI middleware, outermost: refuses what another machine has no business with, before any of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not (
            is_open(scope["path"])
            # Only this machine's own programs need the rest.
            or is_local(scope.get("client"))  # check: guard-is-shut
        ):
            await _refuse(403, "not from here", scope, receive, send)
        elif scope["path"].startswith(FLEET) and not is_known_node(scope):  # check: nodes-prove-their-keys-first
            await _refuse(NOT_A_NODE, "not a node of this agreement", scope, receive, send)
        else:
            most = MAX_BODY_BYTES if scope["path"] != "/health" else 0
            body = await _read_body(receive, most)
            if body is None:
                await _refuse(413, f"at most {most} bytes", scope, receive, send)
            else:
                await self._app(scope, _replay(body, receive), send)


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return OPEN.fullmatch(path) is not None  # check: open-paths-match-whole


def is_known_node(scope: Scope) -> bool:
    """Whether a request's headers prove the key of a node that is registered here. Its body is not needed."""
    request = Request({**scope, "state": {}})
    try:
        key = base64.b64decode(request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""), validate=True)
        request.state.protobuf_request = ActivateNodeRequest(public_key=key)  # Flower compares the two keys
        authenticate_node(request)
    except (ValueError, HTTPException):
        return False
    nodes = request.app.state.linkstate_factory.state()
    return nodes.get_node_id_by_public_key(key) is not None  # check: nodes-are-registered


async def _read_body(receive: Receive, most_bytes: int) -> bytes | None:
    """A request's body, whatever its headers say of it; None once it is too large, or the peer is gone."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > most_bytes:  # check: bodies-are-bounded
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What an app receives whose request was read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _refuse(status: int, reason: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and end the connection: what follows of the request is not read."""
    await PlainTextResponse(f"{reason}\n", status_code=status, headers={"connection": "close"})(scope, receive, send)


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
    program = import_module("flwr.superlink.cli.flower_superlink")  # not the function of this name
    vars(program)["uvicorn"] = SimpleNamespace(run=partial(uvicorn.run, **BOUNDS))
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
