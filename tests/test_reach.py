"""What an owner reads when its coordinator's server cannot be reached: one cause and one hint, within 20 seconds."""

import logging
import socket
import time
from contextlib import ExitStack
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import EngineError, ServerAway
from deploy import network_keys, reach
from deploy.launch.processes import free_port
from deploy.network_keys import write_certificate
from deploy.reach import HEALTH, ask, check_reachable, wait_until_reachable
from tests.support.listeners import GUARD, OTHER, listening, over_tls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_certificate(tmp_path, ["merge.example.org"])
    return tmp_path


def refusal(address: str, root: Path) -> EngineError:
    started = time.monotonic()
    with pytest.raises(EngineError) as caught:
        check_reachable(address, root)
    assert time.monotonic() - started < 20
    return caught.value


def test_a_server_that_is_there_and_the_right_one_is_reachable(folder: Path) -> None:
    with listening(over_tls(folder, GUARD)) as port:
        check_reachable(f"localhost:{port}", folder / "ca.pem")
        assert ask(f"127.0.0.1:{port}", folder / "ca.pem", HEALTH) == 412


def test_a_port_that_nothing_listens_on_is_named(folder: Path) -> None:
    port = free_port()
    error = refusal(f"127.0.0.1:{port}", folder / "ca.pem")
    assert error.message == f"nothing listens at 127.0.0.1:{port}"
    assert "`amalgram server` runs" in error.hint


def test_a_server_that_comes_later_is_waited_for_with_growing_pauses_and_that_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port, pauses = free_port(), list[float]()
    servers = ExitStack()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 7:
            servers.enter_context(listening(over_tls(folder, GUARD), port=port))

    monkeypatch.setattr(reach.time, "sleep", pause)
    with servers, caplog.at_level(logging.INFO, logger="amalgram.client"):
        wait_until_reachable(f"localhost:{port}", folder / "ca.pem")
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    (told,) = caplog.messages
    assert told == (
        f"nothing listens at localhost:{port}; waiting up to 10 minutes for it (ask the coordinator whether `amalgram "
        "server` runs, and for its port)"
    )


def test_a_server_that_stays_away_ends_the_wait_with_the_same_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "MOST_MINUTES", 0.02 / 60)
    monkeypatch.setattr(reach, "FIRST_PAUSE_SECONDS", 0.01)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(EngineError) as caught:
        wait_until_reachable(address, folder / "ca.pem")
    assert str(caught.value) == str(refusal(address, folder / "ca.pem"))


def test_the_wrong_server_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach.time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with listening(over_tls(folder, OTHER)) as port, pytest.raises(EngineError, match="is not an Amalgram server"):
        wait_until_reachable(f"127.0.0.1:{port}", folder / "ca.pem")
    name_server_says(socket.EAI_NONAME, monkeypatch)
    with pytest.raises(EngineError, match="no such host"):
        wait_until_reachable("merge.invalid:9443", folder / "ca.pem")


def name_server_says(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name fail with this error: a machine without a name server gives another than one with it."""

    def fail(*asked: object, **options: object) -> NoReturn:
        raise socket.gaierror(error, "no address")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_a_machine_that_has_no_network_yet_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_server_says(socket.EAI_AGAIN, monkeypatch)
    error = refusal("merge.example.org:9443", folder / "ca.pem")
    assert error.message == "merge.example.org cannot be looked up now"
    assert isinstance(error, ServerAway)  # which a client waits for


def test_a_host_that_does_not_exist_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_server_says(socket.EAI_NONAME, monkeypatch)
    error = refusal("merge.invalid:9443", folder / "ca.pem")
    assert error.message == "merge.invalid: no such host is known here"
    assert "`address`" in error.hint


def test_a_certificate_of_another_authority_is_not_believed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_certificate(other, ["localhost"])
    with listening(over_tls(folder, GUARD)) as port:
        error = refusal(f"127.0.0.1:{port}", other / "ca.pem")
    assert error.message.startswith(f"{other / 'ca.pem'} did not issue the certificate at 127.0.0.1:{port}")
    assert "amalgram keys show" in error.hint
    assert "intercepting" in error.hint


def test_a_certificate_for_other_names_says_for_which(folder: Path) -> None:
    with listening(over_tls(folder, GUARD), "127.0.0.9") as port:
        error = refusal(f"127.0.0.9:{port}", folder / "ca.pem")
    assert error.message.endswith("is for other names than 127.0.0.9: merge.example.org, localhost, 127.0.0.1")
    assert "amalgram keys certificate 127.0.0.9" in error.hint


def test_the_names_of_a_certificate_that_nobody_vouches_for_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[2J.example.org"
    key, ca_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = network_keys._certificate("CA", ca_key, 10)
    names = [x509.DNSName._init_without_validation(hostile)]
    network_keys._write_pair([tmp_path / "ca.key", tmp_path / "ca.pem"], ca_key, ca)
    served = network_keys._certificate("server", key, 10, names, (ca_key, ca))
    network_keys._write_pair([tmp_path / "server.key", tmp_path / "server.pem"], key, served)
    with listening(over_tls(tmp_path, GUARD)) as port:
        error = refusal(f"127.0.0.1:{port}", tmp_path / "ca.pem")
    assert "\\x1b[2J.example.org" in error.message
    assert "\x1b" not in error.message


@pytest.mark.parametrize("days", [pytest.param((-20, -10), id="expired"), pytest.param((10, 20), id="not valid yet")])
def test_a_certificate_that_is_not_valid_now_sends_to_the_clock(
    days: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, zone: tzinfo | None = None) -> datetime:
            return datetime.now(zone) + timedelta(days=days[0])

    write_certificate(tmp_path, ["localhost"])  # a CA that is valid now
    (tmp_path / "server.key").unlink()
    (tmp_path / "server.pem").unlink()
    monkeypatch.setattr(network_keys, "datetime", Then)
    monkeypatch.setattr(
        network_keys, "read_certificate", lambda path: x509.load_pem_x509_certificate(path.read_bytes())
    )
    monkeypatch.setattr(network_keys, "SERVER_DAYS", days[1] - days[0])
    write_certificate(tmp_path, ["localhost"])
    with listening(over_tls(tmp_path, GUARD)) as port:
        error = refusal(f"127.0.0.1:{port}", tmp_path / "ca.pem")
    assert error.message.startswith(f"the certificate at 127.0.0.1:{port} is not valid now")
    assert "clock" in error.hint


def test_a_port_with_another_service_is_told_from_a_server(folder: Path) -> None:
    with listening(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as port:
        error = refusal(f"127.0.0.1:{port}", folder / "ca.pem")
    assert error.message.startswith(f"what answers at 127.0.0.1:{port} does not speak TLS")
    with listening(over_tls(folder, OTHER)) as port:
        error = refusal(f"127.0.0.1:{port}", folder / "ca.pem")
    assert error.message == f"what answers at 127.0.0.1:{port} is not an Amalgram server"
    with listening(over_tls(folder, b"")) as port:
        error = refusal(f"127.0.0.1:{port}", folder / "ca.pem")
    assert error.message.startswith(f"what answers at 127.0.0.1:{port} ends the connection")


def test_a_server_that_takes_the_connection_and_says_nothing_is_not_waited_for_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "ANSWER_SECONDS", 0.2)
    with listening(lambda connection: time.sleep(0.6)) as port:
        error = refusal(f"127.0.0.1:{port}", folder / "ca.pem")
    assert error.message == f"127.0.0.1:{port} does not answer"
    assert f"TCP port {port}" in error.hint


def test_a_resolver_that_takes_its_time_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "LONGEST_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: time.sleep(1) or [])
    assert refusal("merge.example.org:9443", folder / "ca.pem").message == "merge.example.org:9443 does not answer"


def test_a_network_without_a_way_there_is_named(folder: Path) -> None:
    error = refusal("255.255.255.255:9443", folder / "ca.pem")  # the system refuses to connect to everybody
    assert error.message.startswith("255.255.255.255:9443 cannot be reached: ")
    assert "TCP port 9443" in error.hint


def test_a_proxy_of_the_environment_is_used_and_blamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"
    with listening(lambda connection: (connection.recv(65_536), connection.sendall(refused))[1]) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        error = refusal("merge.example.org:9443", folder / "ca.pem")
    assert error.message.startswith(
        "the proxy in this machine's environment does not connect to merge.example.org:9443"
    )
    assert "NO_PROXY" in error.hint
