"""Somebody on the line between an owner and the coordinator's server."""

import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path


class Proxy:
    """Passes on every connection to 127.0.0.1:`target`. While `tampering`, one bit of each piece that an owner sends is
    turned over. With a certificate of its own it ends the encryption itself, and notes what it can read.
    """

    def __init__(self, target: int, certificate: Path | None = None, key: Path | None = None) -> None:
        self._target = target
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate, key)
        self.tampering = False
        self.tampered = 0
        self.connections = 0
        self.read: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *arguments: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                owner, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(owner,), daemon=True).start()

    def _serve(self, owner: socket.socket) -> None:
        with suppress(OSError), owner:  # either side may end at any time
            if self._context is not None:
                owner = self._context.wrap_socket(owner, server_side=True)
            with owner, socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._pass_on, args=(server, owner, False), daemon=True).start()
                self._pass_on(owner, server, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        with suppress(OSError):
            while piece := bytearray(source.recv(65536)):
                if from_owner and self._context is not None:
                    self.read.append(bytes(piece))
                if from_owner and self.tampering:
                    piece[-1] ^= 1
                    self.tampered += 1
                sink.sendall(piece)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
