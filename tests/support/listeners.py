"""Small servers on this machine: what an owner may find at the other end of its connection."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GUARD = b"HTTP/1.1 412 Precondition Failed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
OTHER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"
Answer = Callable[[socket.socket], None]


@contextmanager
def listening(answer: Answer, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A server of one connection after the other on a port of this machine: any free one, unless it is named."""
    with socket.create_server((host, port)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def over_tls(folder: Path, text: bytes) -> Answer:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(folder / "server.pem", folder / "server.key")

    def answer(connection: socket.socket) -> None:
        with trust.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(65_536)
            encrypted.sendall(text)

    return answer
