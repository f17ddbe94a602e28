"""Node keys and certificates: what the files hold, who may read them, and that they do what they are for."""

import logging
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

import deploy.network_keys
from common.errors import SettingsError
from common.identity import Identity, read_public_identity, write_identity
from deploy.network_keys import check_server_files, read_certificate, read_node_key, write_certificate, write_node_key


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def check(folder: Path) -> None:
    check_server_files(folder / "server.pem", folder / "server.key", folder / "ca.pem")


def test_a_node_key_s_public_part_travels_in_the_pub_file(tmp_path: Path) -> None:
    node_key = write_node_key(tmp_path / "ada.node")
    assert mode_of(tmp_path / "ada.node") == 0o600
    assert read_node_key(tmp_path / "ada.node") == node_key
    write_identity(tmp_path / "ada.key", Identity(name="ada", seed=bytes(32)), node_key)
    assert read_public_identity(tmp_path / "ada.pub").node_key == node_key
    with pytest.raises(SettingsError, match="a key is never overwritten"):
        write_node_key(tmp_path / "ada.node")


def test_a_node_key_that_others_may_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    write_node_key(tmp_path / "ada.node")
    (tmp_path / "ada.node").chmod(0o644)
    with pytest.raises(SettingsError, match="other users may read this secret"):
        read_node_key(tmp_path / "ada.node")
    (tmp_path / "other").write_text("no key")
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(SettingsError, match="is not a node key"):
        read_node_key(tmp_path / "other")


def test_a_certificate_is_believed_by_whoever_has_the_root_and_for_its_names_alone(tmp_path: Path) -> None:
    write_certificate(tmp_path, ["merge.example.org", "192.0.2.7"])
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == {
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "server.key": 0o600,
        "server.pem": 0o644,
    }
    check(tmp_path)
    for name in ("merge.example.org", "192.0.2.7", "localhost", "127.0.0.1"):
        assert handshake(tmp_path, tmp_path / "ca.pem", name) is None
    assert "mismatch" in str(handshake(tmp_path, tmp_path / "ca.pem", "other.example.org"))
    (tmp_path / "foreign").mkdir()
    write_certificate(tmp_path / "foreign", ["merge.example.org"])
    assert "unable to get local issuer" in str(handshake(tmp_path, tmp_path / "foreign" / "ca.pem", "localhost"))


def handshake(server: Path, root: Path, name: str) -> ssl.SSLError | None:
    """What a client that knows `root` and connects to `name` finds wrong."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    trust = ssl.create_default_context(cafile=root)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    try:
        trust.wrap_socket(ours, server_hostname=name).close()
    except ssl.SSLError as error:
        return error
    finally:
        ours.close()
        thread.join()
    return None


def test_a_second_certificate_comes_from_the_same_root_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_certificate(tmp_path, ["one.example.org"])
    root = (tmp_path / "ca.pem").read_bytes()
    with pytest.raises(SettingsError, match=r"server\.key: already exists, and a key is never overwritten"):
        write_certificate(tmp_path, ["two.example.org"])
    for name in ("server.key", "server.pem"):
        (tmp_path / name).unlink()
    assert write_certificate(tmp_path, ["two.example.org"]) == [tmp_path / "server.key", tmp_path / "server.pem"]
    assert (tmp_path / "ca.pem").read_bytes() == root
    assert handshake(tmp_path, tmp_path / "ca.pem", "two.example.org") is None
    for name in ("server.key", "server.pem", "ca.key"):
        (tmp_path / name).unlink()
    # Half an authority is not completed with the key of another.
    with pytest.raises(SettingsError, match=r"ca\.pem: already exists"):
        write_certificate(tmp_path, ["three.example.org"])


def test_a_certificate_s_end_is_told_before_and_refused_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deploy.network_keys, "SERVER_DAYS", 29)
    write_certificate(tmp_path, ["localhost"])
    caplog.set_level(logging.WARNING)
    end = datetime.now(UTC) + timedelta(days=29)
    read_certificate(tmp_path / "server.pem")
    assert f"server.pem expires on {end:%Y-%m-%d}, in 28 days" in caplog.text
    (tmp_path / "server.pem").unlink()
    (tmp_path / "server.key").unlink()
    monkeypatch.setattr(deploy.network_keys, "SERVER_DAYS", 0)
    write_certificate(tmp_path, ["localhost"])
    with pytest.raises(SettingsError, match=r"server\.pem: is valid from .* only, today is"):
        check(tmp_path)


def test_server_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_certificate(tmp_path / name, ["localhost"])
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(SettingsError, match=r"server\.key: is not the key of"):
        check_server_files(one / "server.pem", two / "server.key", one / "ca.pem")
    (one / "server.key").chmod(0o640)
    with pytest.raises(SettingsError, match="other users may read this secret"):
        check(one)


def test_a_server_certificate_that_this_machine_s_programs_would_not_believe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.network_keys, "LOCAL_NAMES", ())
    write_certificate(tmp_path, ["merge.example.org"])
    with pytest.raises(SettingsError, match=r"server\.pem: does not name 127\.0\.0\.1"):
        check(tmp_path)


@pytest.mark.parametrize("host", ["münster.example.org", "", "merge.example.org:9443", "-x"])
def test_a_host_that_no_certificate_can_name_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a host name or address"):
        write_certificate(tmp_path, [host])
    assert list(tmp_path.iterdir()) == []


def test_the_root_signs_certificates_and_nothing_below_it_does(tmp_path: Path) -> None:
    write_certificate(tmp_path, ["localhost"])
    for name, is_authority in (("ca", True), ("server", False)):
        extensions = read_certificate(tmp_path / f"{name}.pem").extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is is_authority
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is is_authority
