"""HTTP/1.1 with bounds: how much of this machine a peer can take up before anybody knows who it is.

uvicorn's protocol has no limit on connections, and none on how slowly a request arrives. With httptools, which it
prefers where that is installed, it has none on headers either. Here h11 reads requests wherever the server runs.
"""

import asyncio
from ipaddress import IPv6Address, ip_address
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 16_384
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS = 1024, 64  # from other machines; a node has about three
# How long the head of a request may take to arrive, and its body: 5 MB, Flower's largest, at 17 kB a second.
HEAD_SECONDS, BODY_SECONDS = 20.0, 300.0


class BoundedProtocol(H11Protocol):
    """One connection; it ends if there are too many, or if a request does not arrive in time."""

    _awaited: Any = None  # what h11 waits for: the state of the peer
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not is_local(self.client):
            others = [each.client for each in self.connections if not is_local(each.client)]
            same = [each for each in others if each and self.client and each[0] == self.client[0]]
            if len(others) > MAX_CONNECTIONS or len(same) > MAX_CONNECTIONS_PER_ADDRESS:
                transport.abort()  # check: connections-are-bounded
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Give the peer so much time for what is awaited of it, once that changes."""
        awaited = self.conn.their_state
        if awaited is self._awaited:
            return
        self._awaited = awaited
        self._stop_timer()
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: BODY_SECONDS}.get(awaited)
        if seconds is not None:  # check: requests-arrive-in-time
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a peer (address, port) is on this machine. Whoever has no readable address is not."""
    try:
        address = ip_address(client[0] if client else "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


BOUNDS: dict[str, Any] = {  # of uvicorn.run
    "http": BoundedProtocol,
    "h11_max_incomplete_event_size": MAX_HEADER_BYTES,  # check: heads-are-bounded
    "ws": "none",  # nobody needs web sockets, and they would leave this protocol
}
