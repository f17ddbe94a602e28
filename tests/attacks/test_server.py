"""What a stranger on the network can make the coordinator's server hold, before it proves a key: a bounded little."""

import asyncio
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from starlette.responses import PlainTextResponse

from deploy.launch import bounded_http
from deploy.launch.bounded_http import BOUNDS, MAX_HEADER_BYTES
from deploy.launch.flower import flower_environment
from deploy.launch.guarded_superlink import MAX_BODY_BYTES, Guard
from deploy.launch.processes import free_port, started, wait_for_port
from deploy.network_keys import write_certificate
from tests.support.network import outside_address, proof, wait_until

BLOCK = bytes(1_000_000)
MAX_GROWTH_BYTES = 8_000_000
Server = tuple[int, psutil.Process, ssl.SSLContext]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The guarded SuperLink as `amalgram server` starts it: its port, its process, and trust in its certificate."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    write_certificate(folder, ["localhost"])
    command = [sys.executable, "-m", "deploy.launch.guarded_superlink", "--host", "0.0.0.0", "--port", str(port)]
    command += ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.pem"]
    command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process"]
    environment = flower_environment(folder) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with started(command, environment, folder, folder / "superlink.log") as process:
        wait_for_port(port, process, folder / "superlink.log")
        yield port, psutil.Process(process.pid), ssl.create_default_context(cafile=folder / "ca.pem")


def flood(server: Server, path: str, headers: dict[str, str], megabytes: int) -> tuple[bytes, int]:
    """Send a body as long as it is taken: the answer's first line, and by how much the server grew."""
    port, process, trust = server
    before = peak = process.memory_info().rss
    chunked = "content-length" not in headers
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-type: {PROTOBUF_MEDIA_TYPE}"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + ["transfer-encoding: chunked"] * chunked
    answer = b""
    with trust.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost") as connection:
        connection.settimeout(20)
        with suppress(OSError):  # it was refused
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            for _ in range(megabytes):
                connection.sendall(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK)
                peak = max(peak, process.memory_info().rss)
            connection.sendall(b"0\r\n\r\n" if chunked else b"")
        with suppress(OSError):
            answer = connection.recv(1000)
    return answer.split(b"\r\n")[0], max(peak, process.memory_info().rss) - before


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", "/health"])
@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize("proved", [True, False], ids=["key", "no-key"])
def test_90_a_stranger_s_body_is_not_kept_with_a_length_or_without(
    server: Server, path: str, declared: bool, proved: bool
) -> None:
    """Whoever makes a key can prove it; but it is none of those that are registered."""
    headers = {"content-length": str(100 * len(BLOCK))} if declared else {}
    if proved:
        headers |= proof(generate_key_pairs()[0])
    answer, growth = flood(server, path, headers, 100)
    assert answer[9:12] in (b"412", b"413", b"")
    assert growth < MAX_GROWTH_BYTES


def test_90_headers_without_end_are_not_kept(server: Server) -> None:
    answer, growth = flood(server, "/health", {"content-length": "0", "x": "a" * 50_000_000}, 0)
    assert answer[9:12] in (b"400", b"")
    assert growth < MAX_GROWTH_BYTES
    assert 1000 < MAX_HEADER_BYTES < MAX_BODY_BYTES


@pytest.mark.parametrize("excess", [0, 1])
def test_90_even_this_machine_s_own_bodies_have_a_limit(excess: int) -> None:
    answers: list[Any] = []
    pieces = [BLOCK] * (MAX_BODY_BYTES // len(BLOCK)) + [b"x" * excess, b""]

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        answers.append({"status": len((await receive())["body"])})

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(event: Any) -> None:
        answers.append(event)

    scope = {
        "type": "http",
        "path": "/v1/control/start-run",
        "client": ("127.0.0.1", 1),
        "method": "POST",
        "headers": [],
    }
    asyncio.run(Guard(behind)(scope, receive, send))
    assert answers[0]["status"] == (413 if excess else MAX_BODY_BYTES)


# --- connections ---


@contextmanager
def bounded(address: str) -> Iterator[int]:
    """The bounds in front of an app that answers, in this process; yields its port."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await PlainTextResponse("answered")(scope, receive, send)

    port = free_port()
    config = uvicorn.Config(app, host=address, port=port, log_config=None, lifespan="off", **BOUNDS)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started, "the server")
    yield port
    running.should_exit = running.force_exit = True
    thread.join(10)


def is_answered(connection: socket.socket, request: bytes = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n") -> bool:
    connection.settimeout(5)
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"answered"):
        piece = connection.recv(1000)
        if not piece:
            return False
        answer += piece
    return True


def ends(connection: socket.socket) -> bool:
    """Whether the server ends a connection within a few seconds."""
    connection.settimeout(5)
    try:
        return connection.recv(1000) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HTTP/1.1\r\nhost: x\r\nx: ", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1"]
)
def test_91_a_request_that_does_not_arrive_in_time_is_ended(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(bounded_http, "BODY_SECONDS", 0.3)
    with bounded("127.0.0.1") as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(begun)
        assert ends(connection)


def test_91_a_request_in_time_is_answered_and_so_is_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 2.0)
    with bounded("127.0.0.1") as port, socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(3):
            assert is_answered(connection, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab")


@pytest.mark.parametrize("bound", ["MAX_CONNECTIONS", "MAX_CONNECTIONS_PER_ADDRESS"])
def test_91_connections_from_other_machines_are_counted(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = outside_address()
    if outside is None:
        pytest.skip("this machine has no address beside the loopback")
    monkeypatch.setattr(bounded_http, bound, 2)
    with bounded("0.0.0.0") as port:
        connections = [socket.create_connection((outside, port)) for _ in range(2)]
        with socket.create_connection((outside, port)) as one_more:
            assert ends(one_more)
        with socket.create_connection(("127.0.0.1", port)) as local:
            assert is_answered(local)
        for each in connections:
            assert is_answered(each)
            each.close()
